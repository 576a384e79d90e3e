"""Rotary embeddings that Megatron-Core's table has not: scaled ones, and several in one model.

Frequencies are transformers' own, bit for bit (5.19, modeling_rope_utils.py): Megatron-Core has Llama 3's scaling with
the factor alone to choose, and a YaRN whose factor of queries and keys its fused kernels leave out in silence.
S = tokens, B = sequences, N = query heads of a rank, D = head size, R = rotated channels of it.
"""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn.functional import pad

from megatron_sppo.architecture import Architecture
from megatron_sppo.layer_parts import RopeScaling
from megatron_sppo.model.visibility import PackedRow, undivided_row


def has_own_rope(architecture: Architecture) -> bool:
    """Whether the model rotates otherwise than by base^(-2i/R) in every layer, or R is no part of a head's channels."""
    scaled = architecture.rope_scaling is not None or architecture.windowed_rotary_base is not None
    return scaled or architecture.latent_attention is not None


def is_longrope(architecture: Architecture) -> bool:
    """Whether frequencies depend on a sequence's length."""
    return architecture.rope_scaling is not None and architecture.rope_scaling.rope_type == "longrope"


def inverse_frequencies(
    channels: int, base: float, scaling: RopeScaling | None, *, long: bool = False, device: Any = "cpu"
) -> Tensor:
    """Compute the angle by which one position turns each pair of channels -> [R / 2] float32, radians.

    Args:
        channels: R.
        long: for sequences above `original_max_position_embeddings`, in longrope.
    """
    # On the CPU also where a model is built on the meta device, to be run layer by layer.
    whole = torch.arange(0, channels, 2, dtype=torch.int64, device="cpu")
    exponents = whole.to(device=device, dtype=torch.float) / channels
    kind = None if scaling is None else scaling.rope_type
    if scaling is None or kind == "dynamic":  # up to the model's positions dynamic scaling is none
        return 1.0 / (base**exponents)
    if kind == "linear":
        (factor,) = scaling.needs().values()
        return 1.0 / (base**exponents) / factor
    if kind == "longrope":
        divisors = torch.tensor(scaling.long_factor if long else scaling.short_factor, device=device)
        return 1.0 / (divisors * base**exponents)
    if kind == "llama3":
        return _llama3(1.0 / (base**exponents), scaling)
    return _yarn(base**exponents, channels, base, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by the factor, leave high ones, and go over smoothly between -> [R / 2]."""
    factor, low, high, original = scaling.needs().values()
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(is_between, between, scaled)


def _yarn(periods: Tensor, channels: int, base: float, scaling: RopeScaling) -> Tensor:
    """Go over from interpolation at low frequencies to extrapolation at high ones -> [R / 2]; Peng et al. 2023, 3.2."""
    factor, beta_fast, beta_slow, original = scaling.needs().values()

    def channel(rotations: float) -> float:
        """Say which pair turns so often within the original length."""
        return (channels * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = channel(beta_fast), channel(beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(channels // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    extrapolated = 1 - ramp.clamp(0, 1).to(periods.device)
    return 1.0 / (factor * periods) * (1 - extrapolated) + 1.0 / periods * extrapolated


class RotaryTable(RotaryEmbedding):
    """Megatron-Core's table of angles, with a column for each set of frequencies -> [S, 1, sets, R].

    The first is for layers without a window; the second, where there is one, for layers with a window or (longrope)
    for long sequences.
    """

    def __init__(self, architecture: Architecture, plain: RotaryEmbedding) -> None:
        """Take over what Megatron-Core has built for the model.

        Args:
            plain: the table without scaling: its device and its context-parallel group.
        """
        torch.nn.Module.__init__(self)
        self.rotary_interleaved, self.cp_group = False, plain.cp_group
        self.seq_len_interpolation_factor = None
        channels, base, scaling = architecture.rotary_channels, architecture.rotary_base, architecture.rope_scaling
        device = plain.inv_freq.device
        sets = [inverse_frequencies(channels, base, scaling, device=device)]
        if architecture.windowed_rotary_base is not None:
            sets.append(inverse_frequencies(channels, architecture.windowed_rotary_base, None, device=device))
        if is_longrope(architecture):
            sets.append(inverse_frequencies(channels, base, scaling, long=True, device=device))
        self.inv_freq = torch.stack(sets)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Compute the angles of a half of the channels -> [S, sets, R / 2]. Overrides both versions' method."""
        position = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
        return position[:, None, None] * self.inv_freq

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Compute the angles of all rotated channels -> [S, 1, sets, R], of the whole sequence."""
        table: Tensor = super().get_emb(max_seq_len, offset)
        return table[:, :, 0]


class LongSequences:
    """Which column of a longrope table each sequence takes: that of its own length, as if it were computed alone."""

    def __init__(self, original: int) -> None:
        """Describe it.

        Args:
            original: the longest short sequence, in tokens.
        """
        self._original = original
        self._lengths_B: Tensor | None = None

    def note(self, lengths_B: Tensor | None) -> None:
        """Remember the tokens of each sequence of the micro-batch that runs next; None: there is no padding."""
        self._lengths_B = lengths_B

    def lines(self, table: Tensor, packed: PackedRow | None, *, num_rows: int, num_tokens: int) -> Tensor:
        """Take each token's line of a table [S, 1, 2, R] -> [S, B, 1, R], or of a packed row [T, 1, 1, R].

        Megatron-Core takes a table of as many lines as the row has tokens as it is (rope_utils.py,
        _apply_rotary_pos_emb_thd).

        Args:
            num_rows: B of a padded micro-batch.
            num_tokens: S of one, over all context-parallel ranks.
        """
        if packed is not None and packed.shares_prompts:  # all of them short: training refuses longer ones
            return table[packed.row.keys.position, :, :1]
        lengths = self._lengths_B
        if lengths is None:
            lengths = torch.full((num_rows,), num_tokens) if packed is None else packed.row.documents.diff()
        is_long = (lengths > self._original).long().to(table.device)
        if packed is None:
            is_long_B = pad(is_long, (0, num_rows - len(is_long)))
            return table[:, 0, is_long_B][:, :, None]
        tokens = packed.row.keys
        is_long_D = pad(is_long, (0, len(packed.row.documents) - 1 - len(is_long)))
        return table[tokens.position, 0, is_long_D[tokens.document]][:, None, None]


def long_sequences(architecture: Architecture) -> LongSequences | None:
    """Make what chooses between a model's tables -> LongSequences, or None where there is nothing to choose."""
    if not is_longrope(architecture):
        return None
    assert architecture.rope_scaling is not None
    return LongSequences(architecture.rope_scaling.original_max_position_embeddings or 0)


def rotary_self_attention(architecture: Architecture) -> type[SelfAttention]:
    """Make Megatron-Core's attention take its layer's column of the table, and the scaling's factor -> a subclass.

    The factor multiplies cosine and sine in transformers, hence rotated channels of queries and of keys alike; here
    queries by its square, which leaves Megatron-Core's fused rotation as it is.
    """
    windowed = architecture.windowed_rotary_base is not None
    columns = [int(windowed and architecture.window(layer) is not None) for layer in range(architecture.num_layers)]
    scaling, channels = architecture.rope_scaling, architecture.rotary_channels
    squared = 1.0 if scaling is None else scaling.attention_factor**2
    grow = scaling is not None and scaling.llama_4_scaling_beta is not None

    class RotarySelfAttention(SelfAttention):
        _packed: PackedRow | None = None

        def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
            self._packed = kwargs.get("packed_seq_params")
            if windowed and rotary_pos_emb is not None:
                column = columns[self.layer_number - 1]
                rotary_pos_emb = rotary_pos_emb[:, :, column : column + 1].contiguous()
            return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

        def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            """Project -> (query [S, B, N, D], key, value), queries scaled; both versions call it with keywords."""
            assert kwargs.get("split_qkv", True), "a fused rotation of all three at once would leave the factor out"
            query, *rest = super().get_query_key_value_tensors(*args, **kwargs)
            if grow:
                assert scaling is not None
                query = query * _growth(query, self._packed, scaling, size=self.config.context_parallel_size)
            if squared == 1.0 or columns[self.layer_number - 1]:
                return query, *rest
            if channels == query.shape[-1]:
                return query * squared, *rest
            return torch.cat((query[..., :channels] * squared, query[..., channels:]), dim=-1), *rest

    return RotarySelfAttention


def _growth(query: Tensor, packed: PackedRow | None, scaling: RopeScaling, *, size: int) -> Tensor:
    """Compute what queries are multiplied by for their positions -> [S, 1, 1, 1], in their type.

    transformers 5.19, modeling_ministral3.py, get_llama_4_attn_scale.

    Args:
        query: [S / C, B, N, D], this context-parallel rank's share.
        size: C.
    """
    if packed is None:
        rank = parallel_state.get_context_parallel_rank() if size > 1 else 0
        row = undivided_row(len(query) * size, rank=rank, size=size, device=query.device)
    else:
        row = packed.row
    original, beta = scaling.original_max_position_embeddings, scaling.llama_4_scaling_beta
    assert original is not None and beta is not None
    growth = 1 + beta * torch.log(1 + torch.floor(row.queries.position / original))
    return growth.to(query.dtype)[:, None, None, None]
