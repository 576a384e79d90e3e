"""What vLLM's models compute otherwise than transformers' and training's, without a word: refused before it samples.

Each rule was found by running all families in vLLM 0.32 (tests/e2e/test_families_vllm.py holds them to transformers).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sppo.errors import ConfigError

_CLAMP = 7.0
"""Of gpt-oss's gated unit, as vLLM's kernels have it built in."""
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that vLLM computes otherwise in long sequences, or in all."""

    words: str
    remedy: str = "Use another model: answers would not be this one's."
    tokens: int = 0
    """The longest sequence that it computes alike; 0: it computes none alike."""
    is_of_engine: bool = False
    """What counts is the longest sequence that the engine was started for, rather than any sequence's own length."""
    is_of_cpu: bool = False
    """Its kernels for GPUs are not meant."""


def difference_of(config: Mapping[str, Any]) -> Difference | None:
    """Find what vLLM computes otherwise in a model.

    Args:
        config: the decoder's part of config.json.
    """
    rule = _RULES.get(str(config.get("model_type")))
    return None if rule is None else rule(config)


def check_engine(
    config: Mapping[str, Any],
    *,
    tokens: int,
    place: str,
    has_gpus: Callable[[], bool] = lambda: True,
    server: str | None = None,
) -> None:
    """Refuse a model of which vLLM computes sequences of that length otherwise.

    Args:
        config: the decoder's part of config.json.
        tokens: of the longest prompt with its answer; with `server`, for which the server was started.
        place: how errors name the config.
        has_gpus: tells whether the engine has some, where that is of interest; servers do.
        server: whose own longest sequence is judged; None: an engine's, started for these tokens.

    Raises:
        ConfigError: such a model.
    """
    found = difference_of(config)
    if found is None or tokens <= found.tokens or (server is not None and not found.is_of_engine):
        return
    if found.is_of_cpu and has_gpus():
        return
    if not found.tokens:
        raise ConfigError(f"vLLM does not compute what {place} says: {found.words}. {found.remedy}")
    who = "this run" if server is None else server
    remedy = f"Use --max-model-len {found.tokens}" + (" to start that server." if server is not None else ".")
    raise ConfigError(
        f"vLLM does not compute what {place} says beyond {found.tokens} tokens, and {who} is for {tokens}: "
        f"{found.words}. {remedy}"
    )


def _windows_of_some_layers(config: Mapping[str, Any]) -> Difference | None:
    window, layers = _number(config, "sliding_window"), _number(config, "num_hidden_layers") or 0
    first = _number(config, "max_window_layers") or 0
    kinds = config.get("layer_types") or ["full"] * first + ["sliding"] * (layers - first)
    if not config.get("use_sliding_window") or not window or len(set(kinds)) < 2:
        return None
    return Difference(words="it takes the window of some layers for no layer's or every layer's", tokens=window)


def _long_factors(config: Mapping[str, Any]) -> Difference | None:
    rope = _rope(config)
    original = _number(rope, _ORIGINAL) or _number(config, _ORIGINAL)
    if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "su") or not original:
        return None
    return Difference(words="it takes LongRoPE's long factors for short sequences", tokens=original, is_of_engine=True)


def _growing_queries(config: Mapping[str, Any]) -> Difference | None:
    rope = _rope(config)
    if not rope.get("llama_4_scaling_beta") or config.get("llama_4_scaling"):
        return None
    return Difference(words="it leaves out llama_4_scaling_beta", tokens=_number(rope, _ORIGINAL) or 0)


def _built_in_settings(config: Mapping[str, Any]) -> Difference | None:
    if (clamp := config.get("swiglu_limit", _CLAMP)) != _CLAMP:
        return Difference(words=f"it clamps at {_CLAMP}, not at a swiglu_limit of {clamp}")
    kinds = config.get("layer_types") or []
    if any((kind == "sliding_attention") != (layer % 2 == 0) for layer, kind in enumerate(kinds)):
        window = _number(config, "sliding_window") or 0
        return Difference(words="it gives every second layer a window, from the first on", tokens=window)
    return None


def _latents(config: Mapping[str, Any]) -> Difference | None:
    if not config.get("rope_interleave", True):
        return Difference(words="it rotates neighbouring channels whatever rope_interleave is")
    if (_rope(config).get("rope_type") or _rope(config).get("type")) != "yarn":
        words = "without YaRN it rotates the keys of latent attention otherwise on a CPU"
        return Difference(words=words, is_of_cpu=True)
    if config["model_type"] != "deepseek_v2" and config.get("scoring_func") != "sigmoid":
        words = "it takes a router for one of softmax that does not name its scoring_func"
        return Difference(words=words, remedy='Add "scoring_func": "sigmoid", as published, to that file.')
    return None


def _number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if type(value) is int else None


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # Where a config has both, transformers takes the older name whole (conversion/hf_rope.py).
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    return rope if isinstance(rope, dict) else {}


_RULES: dict[str, Callable[[Mapping[str, Any]], Difference | None]] = {
    "qwen2_moe": _windows_of_some_layers,
    "phi3": _long_factors,
    "ministral3": _growing_queries,
    "gpt_oss": _built_in_settings,
    "deepseek_v2": _latents,
    "deepseek_v3": _latents,
    "kimi_k2": _latents,
}
