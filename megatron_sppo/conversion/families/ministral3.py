"""Ministral 3 (2025): Mistral's tensors, YaRN, and queries that grow with their position."""

from megatron_sppo.conversion.families import mistral
from megatron_sppo.conversion.family import Family, WindowKeys

FAMILY = Family(
    model_type="ministral3",
    architecture_class="Ministral3ForCausalLM",
    mappings=mistral.FAMILY.mappings,
    # Absent, these would mean Ministral-3-8B's values.
    required=("num_key_value_heads", "head_dim", "rms_norm_eps"),
    fixed=mistral.FAMILY.fixed,
    windows=WindowKeys(),
    rope_types=("yarn",),
    rope_must_be_said=True,
    scaled_queries=True,
    ignored=mistral.FAMILY.ignored,
)
