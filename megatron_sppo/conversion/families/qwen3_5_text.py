"""Qwen3.5 and Qwen3.6 (dense, text): Qwen3-Next's layers with dense units, and a delta net's projections apart."""

from megatron_sppo.conversion import delta_config
from megatron_sppo.conversion.families import llama, qwen3_next
from megatron_sppo.conversion.family import Family
from megatron_sppo.conversion.mapping import KeyHeadRows

NET_INPUT = KeyHeadRows(
    f"{qwen3_next.NET}.in_proj.weight",
    qwen3_next.HF_NET,
    tensors=(
        ("in_proj_qkv.weight", ("query", "key", "value")),
        ("in_proj_z.weight", ("gate",)),
        ("in_proj_b.weight", ("rate",)),
        ("in_proj_a.weight", ("decay",)),
    ),
    layers="delta net",
)

FAMILY = Family(
    model_type="qwen3_5_text",
    architecture_class="Qwen3_5ForCausalLM",
    mappings=(
        *qwen3_next.ATTENTION_AND_ENDS,
        NET_INPUT,
        *qwen3_next.NET_REST,
        *(mapping for mapping in llama.MAPPINGS if ".mlp." in mapping.megatron),
    ),
    # Absent, these would mean Qwen3.5-27B's values.
    required=("num_key_value_heads", "head_dim", *delta_config.REQUIRED),
    fixed={"hidden_act": (None, "silu")},
    switches={"attention_bias": llama.ATTENTION_BIASES},
    traits=qwen3_next.TRAITS,
    carried=("mtp.",),
    delta_net=True,
    rotary_percent=0.25,
)
