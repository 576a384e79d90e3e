"""Gemma-2: a norm on both sides of each unit, soft-capped scores and logits, and a window in every second layer."""

from megatron_sppo.conversion.families import llama
from megatron_sppo.conversion.family import Family, WindowKeys
from megatron_sppo.conversion.mapping import Copy

PLACE, HF_PLACE = "decoder.layers.{layer}", "model.layers.{layer}"

# Megatron-Core has no place of its own for these: `model/layer_spec.py` hangs them behind the output projections.
POST_NORMS = (
    Copy(
        f"{PLACE}.self_attention.linear_proj.post_layernorm.weight",
        f"{HF_PLACE}.post_attention_layernorm.weight",
        ("hidden",),
    ),
    Copy(f"{PLACE}.mlp.linear_fc2.post_layernorm.weight", f"{HF_PLACE}.post_feedforward_layernorm.weight", ("hidden",)),
)
# What Llama calls post_attention_layernorm stands before the feed-forward unit.
PRE_FEED_FORWARD = Copy(
    f"{PLACE}.mlp.linear_fc1.layer_norm_weight", f"{HF_PLACE}.pre_feedforward_layernorm.weight", ("hidden",)
)

MAPPINGS = (
    *(mapping for mapping in llama.MAPPINGS if mapping.megatron != PRE_FEED_FORWARD.megatron),
    PRE_FEED_FORWARD,
    *POST_NORMS,
)

FAMILY = Family(
    model_type="gemma2",
    architecture_class="Gemma2ForCausalLM",
    mappings=MAPPINGS,
    # Absent, each of these would mean Gemma-2-2B's value.
    required=(
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
    fixed={
        "hidden_activation": (None, "gelu_pytorch_tanh"),
        "use_bidirectional_attention": (False, None),
    },
    ignored=llama.FAMILY.ignored,
    traits={
        "activation_func": "gelu_tanh",
        "post_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "scale_embeddings": True,
    },
    numbers={
        "query_pre_attn_scalar": "query_pre_attn_scalar",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    },
    switches={"attention_bias": llama.ATTENTION_BIASES},
    windows=WindowKeys(every=2, layer_types=True),
    tied=True,
)
