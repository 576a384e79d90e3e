"""Mistral 7B: Llama's tensors; in v0.1 every layer sees a window of 4096 tokens, from v0.2 on all."""

from megatron_sppo.conversion.families import llama
from megatron_sppo.conversion.family import Family, WindowKeys

FAMILY = Family(
    model_type="mistral",
    architecture_class="MistralForCausalLM",
    mappings=llama.MAPPINGS,
    # Absent, these would mean a window of 4096 tokens and 8 key/value heads.
    required=("sliding_window", "num_key_value_heads"),
    fixed={"hidden_act": (None, "silu")},
    windows=WindowKeys(),
    ignored=llama.FAMILY.ignored,
)
