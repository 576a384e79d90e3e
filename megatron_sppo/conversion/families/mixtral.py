"""Mixtral: Mistral's attention, and in every layer a mixture of experts whose chosen weights add up to 1."""

from megatron_sppo.conversion.families import llama
from megatron_sppo.conversion.families.qwen3_moe import ATTENTION_AND_ENDS, MLP, NORM
from megatron_sppo.conversion.family import ExpertKeys, Family
from megatron_sppo.conversion.mapping import Copy, GateUp

HF_MOE = "model.layers.{layer}.block_sparse_moe"

MAPPINGS = (
    *ATTENTION_AND_ENDS,
    NORM,
    Copy(f"{MLP}.router.weight", f"{HF_MOE}.gate.weight", ("experts", "hidden")),
    GateUp(
        f"{MLP}.experts.experts.{{expert}}.linear_fc1.weight",
        f"{HF_MOE}.experts.{{expert}}.{{gate_up}}.weight",
        width="expert_ffn",
        names=("w1", "w3"),
    ),
    Copy(
        f"{MLP}.experts.experts.{{expert}}.linear_fc2.weight",
        f"{HF_MOE}.experts.{{expert}}.w2.weight",
        ("hidden", "expert_ffn"),
    ),
)

FAMILY = Family(
    model_type="mixtral",
    architecture_class="MixtralForCausalLM",
    mappings=MAPPINGS,
    # Absent, these would mean 8 key/value heads and 1e-5.
    required=("num_key_value_heads", "rms_norm_eps"),
    fixed={"sliding_window": (None,), "hidden_act": (None, "silu"), "router_jitter_noise": (None, 0.0)},
    ignored=llama.FAMILY.ignored,
    rotary_base=1e6,
    experts=ExpertKeys(count=("num_local_experts", "num_experts"), width="intermediate_size"),
)
