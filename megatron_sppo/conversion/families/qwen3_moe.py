"""Qwen3-MoE: Qwen3's attention, and in every layer a mixture of experts without shared ones."""

from megatron_sppo.conversion.families import llama, qwen3
from megatron_sppo.conversion.mapping import Copy, ExpertKeys, Family, GateUp

MLP, HF_MLP = "decoder.layers.{layer}.mlp", "model.layers.{layer}.mlp"

# Before a mixture of experts Megatron-Core keeps the norm by itself: there is no single linear layer to fuse it with.
NORM = Copy(
    "decoder.layers.{layer}.pre_mlp_layernorm.weight",
    "model.layers.{layer}.post_attention_layernorm.weight",
    ("hidden",),
)
ATTENTION_AND_ENDS = tuple(mapping for mapping in llama.MAPPINGS if ".mlp." not in mapping.megatron)

MAPPINGS = (
    *ATTENTION_AND_ENDS,
    NORM,
    *qwen3.HEAD_NORMS,
    Copy(f"{MLP}.router.weight", f"{HF_MLP}.gate.weight", ("experts", "hidden")),
    GateUp(
        f"{MLP}.experts.experts.{{expert}}.linear_fc1.weight",
        f"{HF_MLP}.experts.{{expert}}.{{gate_up}}_proj.weight",
        width="expert_ffn",
    ),
    Copy(
        f"{MLP}.experts.experts.{{expert}}.linear_fc2.weight",
        f"{HF_MLP}.experts.{{expert}}.down_proj.weight",
        ("hidden", "expert_ffn"),
    ),
)

FAMILY = Family(
    model_type="qwen3_moe",
    architecture_class="Qwen3MoeForCausalLM",
    mappings=MAPPINGS,
    required=("num_key_value_heads",),
    fixed={
        "use_sliding_window": (None, False),
        "hidden_act": (None, "silu"),
        # Dense layers between the sparse ones.
        "decoder_sparse_step": (None, 1),
        "mlp_only_layers": (None, []),
        # Not this family's, but named as such by some derived models.
        "shared_expert_intermediate_size": (0, None),
        "num_shared_experts": (0, None),
        "n_shared_experts": (0, None),
    },
    biases={"attention_bias": llama.ATTENTION_BIASES},
    traits={"qk_layernorm": True},
    experts=ExpertKeys(
        count=("num_experts", "num_local_experts"), width="moe_intermediate_size", normalised="norm_topk_prob"
    ),
)
