"""Qwen3-MoE: Qwen3's attention, and mixtures of experts without shared ones; some layers may be dense."""

import dataclasses

from megatron_sppo.conversion.families import llama, qwen3
from megatron_sppo.conversion.family import ExpertKeys, Family
from megatron_sppo.conversion.mapping import Copy, GateUp

MLP, HF_MLP = "decoder.layers.{layer}.mlp", "model.layers.{layer}.mlp"

# Before a mixture of experts Megatron-Core keeps the norm by itself: there is no single linear layer to fuse it with.
NORM = Copy(
    "decoder.layers.{layer}.pre_mlp_layernorm.weight",
    "model.layers.{layer}.post_attention_layernorm.weight",
    ("hidden",),
    layers="sparse",
)
ATTENTION_AND_ENDS = tuple(mapping for mapping in llama.MAPPINGS if ".mlp." not in mapping.megatron)
# What a layer without experts has in their place.
DENSE = tuple(dataclasses.replace(mapping, layers="dense") for mapping in llama.MAPPINGS if ".mlp." in mapping.megatron)
EXPERTS = (
    GateUp(
        f"{MLP}.experts.experts.{{expert}}.linear_fc1.weight",
        f"{HF_MLP}.experts.{{expert}}.{{gate_up}}_proj.weight",
        width="expert_ffn",
        layers="sparse",
        stack=f"{HF_MLP}.experts.gate_up_proj",
    ),
    Copy(
        f"{MLP}.experts.experts.{{expert}}.linear_fc2.weight",
        f"{HF_MLP}.experts.{{expert}}.down_proj.weight",
        ("hidden", "expert_ffn"),
        layers="sparse",
        stack=f"{HF_MLP}.experts.down_proj",
    ),
)
SPARSE = (
    NORM,
    Copy(f"{MLP}.router.weight", f"{HF_MLP}.gate.weight", ("experts", "hidden"), layers="sparse"),
    *EXPERTS,
)

MAPPINGS = (*ATTENTION_AND_ENDS, *qwen3.HEAD_NORMS, *DENSE, *SPARSE)

FAMILY = Family(
    model_type="qwen3_moe",
    architecture_class="Qwen3MoeForCausalLM",
    mappings=MAPPINGS,
    required=("num_key_value_heads",),
    fixed={
        "use_sliding_window": (None, False),
        "hidden_act": (None, "silu"),
        # Not this family's, but named as such by some derived models.
        "shared_expert_intermediate_size": (0, None),
        "num_shared_experts": (0, None),
        "n_shared_experts": (0, None),
    },
    switches={"attention_bias": llama.ATTENTION_BIASES},
    traits={"qk_layernorm": True},
    experts=ExpertKeys(
        count=("num_experts", "num_local_experts"),
        width="moe_intermediate_size",
        normalised="norm_topk_prob",
        dense_between=True,
    ),
)
