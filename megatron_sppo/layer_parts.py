"""Parts of an `Architecture` that have numbers of their own: scaled RoPE, gated delta nets. Pure Python."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_sppo.errors import ConversionError

DELTA_CHUNK = 64
"""Tokens that the gated delta rule computes at once; its time is proportional to it."""
_SCALING_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies differ from base^(-2i/D), by transformers' names (5.19, modeling_rope_utils.py).

    `model/rope.py` computes them. Which fields a type has: `_SCALING_NEEDS`; the others keep their defaults.
    """

    rope_type: Literal["llama3", "linear", "dynamic", "yarn", "longrope"] = "llama3"
    """dynamic changes nothing up to `max_position_embeddings` tokens, and longer sequences are refused."""
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    """Tokens that the model was first trained for; longrope takes `long_factor` for sequences above, whole ones."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    """yarn: whether the bounds of its ramp are rounded to whole channels."""
    attention_factor: float = 1.0
    """yarn, longrope: rotated channels of queries and of keys are multiplied by it."""
    llama_4_scaling_beta: float | None = None
    """yarn: queries at position p are multiplied by 1 + beta log(1 + floor(p / original_max_position_embeddings))."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    """longrope: a divisor for each of D / 2 frequencies."""

    def __post_init__(self) -> None:
        if self.rope_type not in _SCALING_NEEDS:
            raise ConversionError(
                f"rope_scaling is of type {self.rope_type!r}; there are {', '.join(_SCALING_NEEDS)}. "
                "The model's config is wrong."
            )
        for name in _SCALING_NEEDS[self.rope_type]:
            value = getattr(self, name)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if not numbers or any(number is None or not number > 0 for number in numbers):
                raise ConversionError(
                    f"rope_scaling does not describe {self.rope_type}: {name} is {value}. The model's config is wrong."
                )
        beta = self.llama_4_scaling_beta
        if beta is not None and not (beta > 0 and self.original_max_position_embeddings):
            raise ConversionError(
                f"rope_scaling's llama_4_scaling_beta is {beta}, and original_max_position_embeddings "
                f"{self.original_max_position_embeddings}; both must be numbers. The model's config is wrong."
            )
        if not self.attention_factor > 0:
            raise ConversionError(
                f"rope_scaling's attention_factor is {self.attention_factor}; it must be above 0. "
                "The model's config is wrong."
            )

    def needs(self) -> dict[str, Any]:
        """List the fields that this type has -> {name: value}."""
        return {name: getattr(self, name) for name in _SCALING_NEEDS[self.rope_type]}


class LayerKind(NamedTuple):
    """What a layer is made of."""

    has_experts: bool = False
    """Whether its feed-forward unit is a mixture of experts."""
    has_delta_net: bool = False
    """Whether it mixes tokens by a gated delta net, not by attention."""


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Layers that mix tokens by a gated delta net (Yang et al. 2024, arXiv:2412.06464), by Megatron-Core's names.

    Each key head has a value of `linear_num_value_heads / linear_num_key_heads` heads; a convolution over the last
    tokens goes before.
    """

    linear_attention_freq: tuple[int, ...]
    """For each layer of the model 1 if it is one, 0 if it has attention."""
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    """Tokens that the convolution sees, its own included."""

    def __post_init__(self) -> None:
        for name in (
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
        ):
            if not getattr(self, name) >= 1:
                raise ConversionError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ConversionError(
                f"linear_num_value_heads ({self.linear_num_value_heads}) is not a multiple of linear_num_key_heads "
                f"({self.linear_num_key_heads}). The model's config is wrong."
            )
        if not {0} < {0, *self.linear_attention_freq} <= {0, 1}:
            raise ConversionError(
                f"linear_attention_freq {list(self.linear_attention_freq)} must be 0 or 1 for each layer, and 1 for "
                "some. The model's config is wrong."
            )

    @property
    def key_channels(self) -> int:
        """Channels of all key heads, and of all query heads."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_channels(self) -> int:
        """Channels of all value heads."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def mixed_channels(self) -> int:
        """Channels that the convolution goes over: queries, keys and values."""
        return 2 * self.key_channels + self.value_channels

    @property
    def rows_of_key_head(self) -> dict[str, int]:
        """What a token is projected to for one key head -> {kind: channels}, in the order of Megatron's rows.

        "rate" (beta) and "decay" (alpha) have one channel for each value head.
        """
        values = self.linear_num_value_heads // self.linear_num_key_heads
        key, value = self.linear_key_head_dim, values * self.linear_value_head_dim
        return {"query": key, "key": key, "value": value, "gate": value, "rate": values, "decay": values}

    @property
    def projected_channels(self) -> int:
        """What a token is projected to: these, the output's gate, and a decay and a rate for each value head."""
        return self.mixed_channels + self.value_channels + 2 * self.linear_num_value_heads
