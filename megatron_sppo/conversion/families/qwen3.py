"""Qwen3 (dense): Llama's tensors, and RMSNorms over each head of queries and keys."""

from megatron_sppo.conversion.families import llama, qwen2
from megatron_sppo.conversion.family import Family
from megatron_sppo.conversion.mapping import Copy

SELF_ATTENTION, SELF_ATTN = "decoder.layers.{layer}.self_attention", "model.layers.{layer}.self_attn"

HEAD_NORMS = (
    Copy(f"{SELF_ATTENTION}.q_layernorm.weight", f"{SELF_ATTN}.q_norm.weight", ("head",)),
    Copy(f"{SELF_ATTENTION}.k_layernorm.weight", f"{SELF_ATTN}.k_norm.weight", ("head",)),
)
MAPPINGS = (*llama.MAPPINGS, *HEAD_NORMS)

FAMILY = Family(
    model_type="qwen3",
    architecture_class="Qwen3ForCausalLM",
    mappings=MAPPINGS,
    required=("num_key_value_heads", "head_dim"),
    fixed={"use_sliding_window": (None, True, False), "hidden_act": (None, "silu")},
    traits={"qk_layernorm": True},
    switches={"attention_bias": llama.ATTENTION_BIASES},
    windows=qwen2.WINDOWS,
)
