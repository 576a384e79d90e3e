"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, experts, and a shared one that each token weighs by a gate."""

from megatron_sppo.conversion.families import qwen3_moe
from megatron_sppo.conversion.families.qwen3_moe import HF_MLP, MLP
from megatron_sppo.conversion.family import ExpertKeys, Family, WindowKeys
from megatron_sppo.conversion.mapping import Copy, GateUp


def shared_expert(name: str) -> tuple[GateUp, Copy]:
    """Map the shared expert, called `name` by Hugging Face -> its two tensors."""
    return (
        GateUp(
            f"{MLP}.shared_experts.linear_fc1.weight",
            f"{HF_MLP}.{name}.{{gate_up}}_proj.weight",
            width="shared_ffn",
            layers="sparse",
            only="moe_shared_expert_intermediate_size",
        ),
        Copy(
            f"{MLP}.shared_experts.linear_fc2.weight",
            f"{HF_MLP}.{name}.down_proj.weight",
            ("hidden", "shared_ffn"),
            layers="sparse",
            only="moe_shared_expert_intermediate_size",
        ),
    )


SHARED_GATE = Copy(
    f"{MLP}.shared_experts.gate_weight",
    f"{HF_MLP}.shared_expert_gate.weight",
    ("one", "hidden"),
    layers="sparse",
    only="moe_shared_expert_gate",
)
MAPPINGS = (
    *qwen3_moe.ATTENTION_AND_ENDS,
    *qwen3_moe.DENSE,
    *qwen3_moe.SPARSE,
    *shared_expert("shared_expert"),
    SHARED_GATE,
)

FAMILY = Family(
    model_type="qwen2_moe",
    architecture_class="Qwen2MoeForCausalLM",
    mappings=MAPPINGS,
    # Absent, these would mean Qwen1.5-MoE-A2.7B's values.
    required=("num_key_value_heads", "num_experts", "num_experts_per_tok", "shared_expert_intermediate_size"),
    fixed={"qkv_bias": (None, True), "use_sliding_window": (None, True, False), "hidden_act": (None, "silu")},
    traits={"add_qkv_bias": True, "moe_shared_expert_gate": True},
    windows=WindowKeys(switch="use_sliding_window", end="max_window_layers", every=2, layer_types=True),
    experts=ExpertKeys(
        count=("num_experts", "num_local_experts"),
        width="moe_intermediate_size",
        normalised="norm_topk_prob",
        dense_between=True,
        shared_width="shared_expert_intermediate_size",
    ),
)
