"""Parts of an `Architecture` that have numbers of their own: scaled RoPE, latent attention, gated delta nets.

Pure Python.
"""

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


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1), by Megatron-Core's names.

    Keys and values of all heads are made of one vector of `kv_lora_rank` channels a token. The first `qk_head_dim`
    channels of a head are not rotated, and the rest of a key are the same in all heads.
    """

    q_lora_rank: int | None = None
    """Channels of the vector that all queries are made of; None: of the hidden state itself."""
    kv_lora_rank: int
    qk_head_dim: int
    """Channels of a query's or a key's head that are not rotated."""
    qk_pos_emb_head_dim: int
    """Those that are."""
    v_head_dim: int
    """Channels of a value's head."""
    rotary_interleaved: bool = True
    """Whether two channels that turn together are neighbours; otherwise they are half of the rotated ones apart."""
    mscale_all_dim: float = 0.0
    """Under scaled RoPE scores are multiplied by (0.1 `mscale_all_dim` log(factor) + 1)^2."""

    def __post_init__(self) -> None:
        for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ConversionError(f"{name} is {value}; it must be at least 1. The model's config is wrong.")
        if self.qk_pos_emb_head_dim % 2:
            raise ConversionError(
                f"qk_pos_emb_head_dim ({self.qk_pos_emb_head_dim}) is odd, and rotary embeddings need pairs. "
                "The model's config is wrong."
            )
        if not self.mscale_all_dim >= 0:
            raise ConversionError(f"mscale_all_dim is {self.mscale_all_dim}; it must not be below 0.")

    @property
    def query_head_dim(self) -> int:
        """Channels of a query's head, and of a key's."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim

    @property
    def kv_down_channels(self) -> int:
        """What a token is projected to for keys and values: the vector, and the rotated part of its key."""
        return self.kv_lora_rank + self.qk_pos_emb_head_dim

    @property
    def kv_up_head_dim(self) -> int:
        """What that vector is projected to for each head: the rest of its key, and its value."""
        return self.qk_head_dim + self.v_head_dim

    def weights(self, *, hidden: int, heads: int) -> dict[str, int]:
        """Count the weights of one layer -> {Megatron's name: weights}; all ranks hold those of the latent vectors.

        Args:
            hidden: channels of the hidden state.
            heads: of this tensor-parallel rank.
        """
        queries, rank = heads * self.query_head_dim, self.q_lora_rank
        weights = {"linear_proj": hidden * heads * self.v_head_dim}
        if rank is None:
            weights["linear_q_proj"] = hidden * queries
        else:
            weights |= {"linear_q_down_proj": hidden * rank, "q_layernorm": rank, "linear_q_up_proj": rank * queries}
        return weights | {
            "linear_kv_down_proj": hidden * self.kv_down_channels,
            "kv_layernorm": self.kv_lora_rank,
            "linear_kv_up_proj": self.kv_lora_rank * heads * self.kv_up_head_dim,
        }
