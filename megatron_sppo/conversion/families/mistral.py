"""Mistral 7B from v0.2 on: Llama's tensors, no sliding window."""

from megatron_sppo.conversion.families import llama
from megatron_sppo.conversion.rules import Family

FAMILY = Family(
    model_type="mistral",
    architecture_class="MistralForCausalLM",
    rules=llama.RULES,
    # Absent, these would mean a window of 4096 tokens and 8 key/value heads.
    required=("sliding_window", "num_key_value_heads"),
    fixed={"sliding_window": (None,), "hidden_act": (None, "silu")},
    ignored=llama.FAMILY.ignored,
)
