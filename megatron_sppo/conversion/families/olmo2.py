"""OLMo-2: norms behind attention and feed-forward unit, none before; norms over all heads of queries and of keys."""

from megatron_sppo.conversion.families import gemma2, llama, qwen3
from megatron_sppo.conversion.family import Family
from megatron_sppo.conversion.mapping import Copy

MAPPINGS = (
    *(mapping for mapping in llama.MAPPINGS if not mapping.megatron.endswith(".layer_norm_weight")),
    Copy(f"{qwen3.SELF_ATTENTION}.q_layernorm.weight", f"{qwen3.SELF_ATTN}.q_norm.weight", ("query",)),
    Copy(f"{qwen3.SELF_ATTENTION}.k_layernorm.weight", f"{qwen3.SELF_ATTN}.k_norm.weight", ("key",)),
    *gemma2.POST_NORMS,
)

FAMILY = Family(
    model_type="olmo2",
    architecture_class="Olmo2ForCausalLM",
    mappings=MAPPINGS,
    # Absent, it would mean 1e-5.
    required=("rms_norm_eps",),
    fixed={"clip_qkv": (None,), "hidden_act": (None, "silu")},
    switches={"attention_bias": llama.ATTENTION_BIASES},
    traits={
        "qk_layernorm": True,
        "qk_layernorm_across_heads": True,
        "pre_layernorm": False,
        "post_layernorm": True,
    },
)
