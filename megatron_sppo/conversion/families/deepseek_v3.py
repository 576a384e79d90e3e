"""DeepSeek-V3, V3.1 and R1: latent attention; sigmoid routers whose biases choose, from groups; shared experts.

The published weights are FP8 in blocks, and read as bfloat16 numbers. The layer behind the last one, which predicts a
further token, is carried along.
"""

from megatron_sppo.checkpoints.fp8 import METHOD
from megatron_sppo.conversion import latent_config
from megatron_sppo.conversion.families import glm4_moe, llama, qwen2_moe, qwen3_moe
from megatron_sppo.conversion.family import Family
from megatron_sppo.conversion.mapping import Copy

ATTENTION, ATTN = "decoder.layers.{layer}.self_attention", "model.layers.{layer}.self_attn"

LATENT_ATTENTION = (
    Copy(f"{ATTENTION}.linear_q_proj.weight", f"{ATTN}.q_proj.weight", ("query", "hidden"), only="has_direct_queries"),
    Copy(
        f"{ATTENTION}.linear_q_down_proj.weight",
        f"{ATTN}.q_a_proj.weight",
        ("q_latent", "hidden"),
        only="has_query_latents",
    ),
    # Megatron-Core saves the norms of latent vectors under the names of Transformer Engine's fused layers.
    Copy(
        f"{ATTENTION}.linear_q_up_proj.layer_norm_weight",
        f"{ATTN}.q_a_layernorm.weight",
        ("q_latent",),
        only="has_query_latents",
    ),
    Copy(
        f"{ATTENTION}.linear_q_up_proj.weight",
        f"{ATTN}.q_b_proj.weight",
        ("query", "q_latent"),
        only="has_query_latents",
    ),
    Copy(f"{ATTENTION}.linear_kv_down_proj.weight", f"{ATTN}.kv_a_proj_with_mqa.weight", ("kv_down", "hidden")),
    Copy(f"{ATTENTION}.linear_kv_up_proj.layer_norm_weight", f"{ATTN}.kv_a_layernorm.weight", ("kv_latent",)),
    Copy(f"{ATTENTION}.linear_kv_up_proj.weight", f"{ATTN}.kv_b_proj.weight", ("kv_up", "kv_latent")),
    Copy(f"{ATTENTION}.linear_proj.weight", f"{ATTN}.o_proj.weight", ("hidden", "context")),
    Copy("decoder.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.input_layernorm.weight", ("hidden",)),
)
LATENT_ATTENTION_AND_EXPERTS = (
    *(mapping for mapping in llama.MAPPINGS if not mapping.per_layer),
    *LATENT_ATTENTION,
    *qwen3_moe.DENSE,
    *qwen3_moe.SPARSE,
    *qwen2_moe.shared_expert("shared_experts"),
)
# Absent, these would mean a published model's values.
REQUIRED = (
    *latent_config.REQUIRED,
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace"),
    *("routed_scaling_factor", "n_group", "topk_group"),
)
FIXED = {"attention_bias": (None, False), "hidden_act": (None, "silu"), "moe_layer_freq": (None, 1)}
ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3")

FAMILY = Family(
    model_type="deepseek_v3",
    architecture_class="DeepseekV3ForCausalLM",
    mappings=(*LATENT_ATTENTION_AND_EXPERTS, glm4_moe.EXPERT_BIAS),
    required=REQUIRED,
    fixed={**FIXED, "scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")},
    traits={"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    latent_attention=True,
    further_layers="num_nextn_predict_layers",
    rope_types=ROPE_TYPES,
    quantized=METHOD,
    experts=glm4_moe.EXPERTS,
)
