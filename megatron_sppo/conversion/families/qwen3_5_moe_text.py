"""Qwen3.5-MoE and Qwen3.6-MoE (text): Qwen3.5's layers, Qwen3-Next's experts, which are in every layer."""

import dataclasses

from megatron_sppo.conversion import delta_config
from megatron_sppo.conversion.families import qwen2_moe, qwen3_5_text, qwen3_moe, qwen3_next
from megatron_sppo.conversion.family import ExpertKeys

FAMILY = dataclasses.replace(
    qwen3_5_text.FAMILY,
    model_type="qwen3_5_moe_text",
    architecture_class="Qwen3_5MoeForCausalLM",
    mappings=(
        *qwen3_next.ATTENTION_AND_ENDS,
        qwen3_5_text.NET_INPUT,
        *qwen3_next.NET_REST,
        *qwen3_moe.SPARSE,
        *qwen2_moe.shared_expert("shared_expert"),
        qwen2_moe.SHARED_GATE,
    ),
    # Absent, these would mean Qwen3.5-35B-A3B's values.
    required=(
        *("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "shared_expert_intermediate_size"),
        *delta_config.REQUIRED,
    ),
    traits={**qwen3_next.TRAITS, "moe_shared_expert_gate": True},
    experts=ExpertKeys(
        count=("num_experts", "num_local_experts"),
        width="moe_intermediate_size",
        shared_width="shared_expert_intermediate_size",
    ),
)
