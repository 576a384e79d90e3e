"""Qwen3-Next: gated delta nets in three of four layers, gated attention in the others, experts with a shared one.

Norms are zero-centered but the one of a delta net's heads. The layer that predicts a further token is carried along.
"""

import dataclasses

from megatron_sppo.conversion import delta_config
from megatron_sppo.conversion.families import llama, qwen2_moe, qwen3, qwen3_moe
from megatron_sppo.conversion.family import ExpertKeys, Family
from megatron_sppo.conversion.mapping import Copy, GatedQKV, KeyHeadRows, TensorMapping

NET, HF_NET = "decoder.layers.{layer}.self_attention", "model.layers.{layer}.linear_attn"


def _of_attention(mapping: TensorMapping) -> TensorMapping:
    """Let a mapping of Llama's hold for layers with attention alone; queries come with their gates."""
    if ".linear_qkv.weight" in mapping.megatron:
        return GatedQKV(mapping.megatron, mapping.hf, layers="attention")
    return dataclasses.replace(mapping, layers="attention") if ".self_attention." in mapping.megatron else mapping


# Query, key, value and gate of each key head lie together, as do its rates and decays.
NET_INPUT = KeyHeadRows(
    f"{NET}.in_proj.weight",
    HF_NET,
    tensors=(("in_proj_qkvz.weight", ("query", "key", "value", "gate")), ("in_proj_ba.weight", ("rate", "decay"))),
    together=True,
    layers="delta net",
)
NET_REST = (
    KeyHeadRows(
        f"{NET}.conv1d_weight",
        HF_NET,
        tensors=(("conv1d.weight", ("query", "key", "value")),),
        columns=("one", "delta_kernel"),
        layers="delta net",
    ),
    Copy(f"{NET}.A_log", f"{HF_NET}.A_log", ("delta_heads",), layers="delta net"),
    Copy(f"{NET}.dt_bias", f"{HF_NET}.dt_bias", ("delta_heads",), layers="delta net"),
    Copy(f"{NET}.head_norm.weight", f"{HF_NET}.norm.weight", ("delta_value_head",), layers="delta net"),
    Copy(f"{NET}.out_proj.weight", f"{HF_NET}.out_proj.weight", ("hidden", "delta_value"), layers="delta net"),
    Copy(
        f"{NET}.in_proj.layer_norm_weight",
        "model.layers.{layer}.input_layernorm.weight",
        ("hidden",),
        layers="delta net",
    ),
)
ATTENTION_AND_ENDS = tuple(_of_attention(mapping) for mapping in (*qwen3_moe.ATTENTION_AND_ENDS, *qwen3.HEAD_NORMS))
TRAITS = {"qk_layernorm": True, "layernorm_zero_centered_gamma": True, "attention_output_gate": True}

FAMILY = Family(
    model_type="qwen3_next",
    architecture_class="Qwen3NextForCausalLM",
    mappings=(
        *ATTENTION_AND_ENDS,
        NET_INPUT,
        *NET_REST,
        *qwen3_moe.DENSE,
        *qwen3_moe.SPARSE,
        *qwen2_moe.shared_expert("shared_expert"),
        qwen2_moe.SHARED_GATE,
    ),
    # Absent, these would mean Qwen3-Next-80B-A3B's values.
    required=(
        *("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "shared_expert_intermediate_size"),
        *delta_config.REQUIRED,
    ),
    fixed={"hidden_act": (None, "silu")},
    switches={"attention_bias": llama.ATTENTION_BIASES},
    traits={**TRAITS, "moe_shared_expert_gate": True},
    carried=("mtp.",),
    delta_net=True,
    rotary_percent=0.25,
    experts=ExpertKeys(
        count=("num_experts", "num_local_experts"),
        width="moe_intermediate_size",
        normalised="norm_topk_prob",
        normalised_by_default=True,
        dense_between=True,
        shared_width="shared_expert_intermediate_size",
    ),
)
