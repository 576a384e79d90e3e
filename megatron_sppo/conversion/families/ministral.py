"""Ministral (2024): Mistral's tensors, and a window in the layers that the config lists."""

from megatron_sppo.conversion.families import mistral
from megatron_sppo.conversion.family import Family, WindowKeys

FAMILY = Family(
    model_type="ministral",
    architecture_class="MinistralForCausalLM",
    mappings=mistral.FAMILY.mappings,
    # Absent, these would mean a window of 4096 tokens and 8 key/value heads.
    required=mistral.FAMILY.required,
    fixed=mistral.FAMILY.fixed,
    windows=WindowKeys(layer_types=True),
    ignored=mistral.FAMILY.ignored,
)
