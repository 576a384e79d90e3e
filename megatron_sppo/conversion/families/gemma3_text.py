"""Gemma-3 (text): Gemma-2's layers with norms over heads, no caps, and two RoPE bases: with a window and without."""

from megatron_sppo.conversion.families import gemma2, qwen3
from megatron_sppo.conversion.family import Family, WindowedRope, WindowKeys

FAMILY = Family(
    model_type="gemma3_text",
    architecture_class="Gemma3ForCausalLM",
    mappings=(*gemma2.MAPPINGS, *qwen3.HEAD_NORMS),
    # Absent, each of these would mean Gemma-3-4B's value.
    required=("num_key_value_heads", "head_dim", "sliding_window", "query_pre_attn_scalar"),
    fixed=gemma2.FAMILY.fixed,
    ignored=gemma2.FAMILY.ignored,
    traits={**gemma2.FAMILY.traits, "qk_layernorm": True},
    switches=gemma2.FAMILY.switches,
    numbers=gemma2.FAMILY.numbers,
    windows=WindowKeys(layer_types=True, full_every=6, full_every_key="sliding_window_pattern"),
    rotary_base=1e6,
    windowed_rope=WindowedRope(base=1e4, base_key="rope_local_base_freq"),
    tied=True,
)
