"""Phi-3, Phi-3.5 and Phi-4: Llama's model, with query, key and value, and gate and up, in one tensor each."""

from megatron_sppo.conversion.families import llama
from megatron_sppo.conversion.family import Family, WindowKeys
from megatron_sppo.conversion.mapping import FusedQKV, GateUp, PackedGateUp, PackedQKV

ATTENTION, MLP = "decoder.layers.{layer}.self_attention", "decoder.layers.{layer}.mlp"

MAPPINGS = (
    *(mapping for mapping in llama.MAPPINGS if not isinstance(mapping, (FusedQKV, GateUp))),
    PackedQKV(f"{ATTENTION}.linear_qkv.weight", "model.layers.{layer}.self_attn.qkv_proj.weight"),
    PackedGateUp(f"{MLP}.linear_fc1.weight", "model.layers.{layer}.mlp.gate_up_proj.weight"),
)

FAMILY = Family(
    model_type="phi3",
    architecture_class="Phi3ForCausalLM",
    mappings=MAPPINGS,
    # Absent, it would mean 1e-5.
    required=("rms_norm_eps",),
    # Dropout is not computed; a model that was trained with it stands for the network without.
    fixed={"hidden_act": (None, "silu")},
    ignored=llama.FAMILY.ignored,
    windows=WindowKeys(),
    rope_types=("longrope",),
    rotary_percent=1.0,
    original_positions=4096,
)
