"""GLM-4.5, 4.5-Air and 4.6: sigmoid routers whose biases choose, a shared expert, dense layers in front.

Half of each head is rotated. The layer behind the last one, which predicts a further token, is carried along.
"""

import dataclasses

from megatron_sppo.conversion.families import qwen2_moe, qwen3, qwen3_moe
from megatron_sppo.conversion.families.qwen3_moe import HF_MLP, MLP
from megatron_sppo.conversion.family import ExpertKeys, Family
from megatron_sppo.conversion.mapping import Copy

HEAD_NORMS = tuple(dataclasses.replace(mapping, only="qk_layernorm") for mapping in qwen3.HEAD_NORMS)
EXPERT_BIAS = Copy(
    f"{MLP}.router.expert_bias",
    f"{HF_MLP}.gate.e_score_correction_bias",
    ("experts",),
    layers="sparse",
    only="moe_router_enable_expert_bias",
    keeps_type=True,
)

MAPPINGS = (
    *qwen3_moe.ATTENTION_AND_ENDS,
    *HEAD_NORMS,
    *qwen3_moe.DENSE,
    *qwen3_moe.SPARSE,
    EXPERT_BIAS,
    *qwen2_moe.shared_expert("shared_experts"),
)

EXPERTS = ExpertKeys(
    count=("n_routed_experts", "num_local_experts"),
    width="moe_intermediate_size",
    normalised="norm_topk_prob",
    normalised_by_default=True,
    dense_before="first_k_dense_replace",
    shared_count="n_shared_experts",
    groups=("n_group", "topk_group"),
    scaling="routed_scaling_factor",
)
"""DeepSeek-V3 spells its config alike."""

FAMILY = Family(
    model_type="glm4_moe",
    architecture_class="Glm4MoeForCausalLM",
    mappings=MAPPINGS,
    # Absent, these would mean GLM-4.5-Air's values, or 1e-5.
    required=("num_key_value_heads", "n_shared_experts", "first_k_dense_replace", "rms_norm_eps"),
    fixed={"hidden_act": (None, "silu")},
    traits={"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    switches={"attention_bias": ("add_qkv_bias",), "use_qk_norm": ("qk_layernorm",)},
    further_layers="num_nextn_predict_layers",
    rotary_percent=0.5,
    experts=EXPERTS,
)
