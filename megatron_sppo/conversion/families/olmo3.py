"""OLMo-3: OLMo-2's layers, three of four with a window, and scaled rotary embeddings in the others alone."""

from megatron_sppo.conversion.families import llama, olmo2
from megatron_sppo.conversion.family import Family, WindowedRope, WindowKeys

FAMILY = Family(
    model_type="olmo3",
    architecture_class="Olmo3ForCausalLM",
    mappings=olmo2.MAPPINGS,
    # Absent, these would mean 1e-5 and 4096.
    required=("rms_norm_eps", "sliding_window"),
    fixed={"hidden_act": (None, "silu")},
    traits=olmo2.FAMILY.traits,
    switches={"attention_bias": llama.ATTENTION_BIASES},
    windows=WindowKeys(layer_types=True, full_every=4),
    rotary_base=5e5,
    windowed_rope=WindowedRope(base=5e5),
)
