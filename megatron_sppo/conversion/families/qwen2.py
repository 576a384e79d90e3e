"""Qwen2 and Qwen2.5: Llama's tensors, and biases of the query, key and value projections."""

from megatron_sppo.conversion.families import llama
from megatron_sppo.conversion.rules import Family, FusedQKV

RULES = (
    *llama.RULES,
    FusedQKV(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        "model.layers.{layer}.self_attn.{qkv}_proj.bias",
        columns=(),
    ),
)

FAMILY = Family(
    model_type="qwen2",
    architecture_class="Qwen2ForCausalLM",
    rules=RULES,
    required=("num_key_value_heads",),
    fixed={"use_sliding_window": (None, False), "hidden_act": (None, "silu")},
    add_qkv_bias=True,
)
