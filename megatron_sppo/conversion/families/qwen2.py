"""Qwen2 and Qwen2.5: Llama's tensors, biases of query, key and value; a window of tokens that may be switched on."""

from megatron_sppo.conversion.families import llama
from megatron_sppo.conversion.family import Family, WindowKeys

WINDOWS = WindowKeys(switch="use_sliding_window", first_layer="max_window_layers", layer_types=True)

FAMILY = Family(
    model_type="qwen2",
    architecture_class="Qwen2ForCausalLM",
    mappings=llama.MAPPINGS,
    required=("num_key_value_heads",),
    fixed={"use_sliding_window": (None, True, False), "hidden_act": (None, "silu")},
    traits={"add_qkv_bias": True},
    windows=WINDOWS,
)
