"""Which rows of which Hugging Face tensors a Megatron-Core tensor is made of; one description serves both directions.

A family's table (families/<family>.py) is a tuple of these. A Megatron name with "{layer}" is one slice of a tensor
that Megatron-Core's distributed checkpoint stacks over layers: "decoder.layers.{layer}.mlp.linear_fc2.weight" is
[layer] of the key "decoder.layers.mlp.linear_fc2.weight", whose first axis counts layers. "{expert}" likewise: experts
are the second axis. Where layers are of two kinds nothing is stacked over them, experts still are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.safetensors_file import Shape

if TYPE_CHECKING:
    from torch import Tensor


def dimension(architecture: Architecture, name: str) -> int:
    """Return the size of a named dimension.

    "hidden", "ffn", "query" (all heads), "key" (all key/value heads), "head", "heads" (how many), "vocab",
    "experts", "expert_ffn" (one), "shared_ffn" (of all shared experts), "one"; of a gated delta net "delta_heads" (of
    values), "delta_value" (all of their channels), "delta_value_head" (of one), "delta_kernel"; of latent attention
    "q_latent" and "kv_latent" (ranks), "kv_down", "kv_up" (of all heads), "context" (what all heads answer).
    """
    net = architecture.delta_net
    if name.startswith("delta_"):
        assert net is not None
        return {
            "delta_heads": net.linear_num_value_heads,
            "delta_value": net.value_channels,
            "delta_value_head": net.linear_value_head_dim,
            "delta_kernel": net.linear_conv_kernel_dim,
        }[name]
    latent = architecture.latent_attention
    if latent is not None and name in ("q_latent", "kv_latent", "kv_down", "kv_up"):
        return {
            "q_latent": latent.q_lora_rank or 0,
            "kv_latent": latent.kv_lora_rank,
            "kv_down": latent.kv_down_channels,
            "kv_up": architecture.num_attention_heads * latent.kv_up_head_dim,
        }[name]
    return {
        "context": architecture.context_channels,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "query": architecture.query_channels,
        "key": architecture.key_channels,
        "head": architecture.kv_channels,
        "heads": architecture.num_attention_heads,
        "vocab": architecture.vocab_size,
        "experts": architecture.num_moe_experts or 0,
        "expert_ffn": architecture.moe_ffn_hidden_size or 0,
        "shared_ffn": architecture.moe_shared_expert_intermediate_size or 0,
        "one": 1,
    }[name]


class Run(NamedTuple):
    """Consecutive rows of one Hugging Face tensor."""

    part: int
    """Which of the mapping's parts."""
    start: int
    rows: int


@dataclass(frozen=True)
class TensorMapping:
    """One Megatron tensor and its Hugging Face tensors."""

    megatron: str
    """Megatron-Core's name; with "{layer}" where it belongs to a layer, and "{expert}" where to an expert of it."""
    hf: str
    """Hugging Face's name; with "{layer}" likewise."""
    layers: Literal["all", "dense", "sparse", "attention", "delta net"] = field(default="all", kw_only=True)
    """Which layers have it, of a model where some are dense and others have experts, or where some have a gated delta
    net in place of attention."""
    only: str | None = field(default=None, kw_only=True)
    """Field of `Architecture` without which no layer has it, such as "qk_layernorm"."""
    keeps_type: bool = field(default=False, kw_only=True)
    """Whether no cast changes it: transformers keeps it in float32 whatever the model's type."""
    stack: str | None = field(default=None, kw_only=True)
    """Hugging Face's name for all experts of a layer in one tensor, in files that have them so (`expert_stacks`)."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron

    @property
    def key(self) -> str:
        """Megatron's key in the distributed checkpoint where layers and experts are stacked."""
        return self.megatron.replace(".{layer}", "").replace(".{expert}", "")

    def cast(self, dtype: Any) -> Any:
        """Say which type a conversion to `dtype` gives the tensor -> torch.dtype; None: its own."""
        return None if self.keeps_type else dtype

    def applies(self, architecture: Architecture) -> bool:
        """Whether a model of this architecture has the tensor."""
        return self.only is None or bool(getattr(architecture, self.only))

    def in_layer(self, architecture: Architecture, layer: int) -> bool:
        """Whether a layer (from 0) has the tensor."""
        if self.layers in ("attention", "delta net"):
            return (self.layers == "delta net") == architecture.has_delta_net(layer)
        return self.layers == "all" or (self.layers == "sparse") == architecture.has_experts(layer)

    def parts(self) -> tuple[str, ...]:
        """Hugging Face's names, layer and expert not yet filled in."""
        return (self.hf,)

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `parts`."""
        raise NotImplementedError

    def runs(self, architecture: Architecture) -> list[Run]:
        """The Megatron tensor's rows, in its order; together all rows of all parts. Here: one part after the other."""
        return [Run(part, 0, shape[0]) for part, shape in enumerate(self.part_shapes(architecture))]

    def read_apart(self, architecture: Architecture) -> list[list[Run]]:
        """The runs in groups, one for each part that Megatron-Core's checkpoints describe by itself. Here: one group.

        The ranks that share a load read such parts, and may not be the same ranks.
        """
        return [self.runs(architecture)]

    def megatron_shape(self, architecture: Architecture) -> Shape:
        """Shape of the Megatron tensor, without the axes of layers and experts."""
        shapes = self.part_shapes(architecture)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def to_hf(self, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
        """Divide the Megatron tensor among its parts: undo `to_megatron` -> tensors of `part_shapes`."""
        runs = self.runs(architecture)
        starts = itertools.accumulate((run.rows for run in runs), initial=0)
        placed = sorted(zip(runs, starts, strict=False))
        parts = itertools.groupby(placed, key=lambda pair: pair[0].part)
        return tuple(_joined([tensor[start : start + run.rows] for run, start in part]) for _, part in parts)


def to_megatron(tensors: Mapping[int, Tensor], runs: Sequence[Run]) -> Tensor:
    """Join runs of rows of a mapping's parts, {part: tensor}: with all runs, the Megatron tensor -> [rows, ...]."""
    return _joined([tensors[part][start : start + rows] for part, start, rows in runs])


def _joined(pieces: Sequence[Tensor], *, dim: int = 0) -> Tensor:
    import torch  # here: the tables alone need no torch

    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=dim)


@dataclass(frozen=True)
class Copy(TensorMapping):
    """The same tensor under another name."""

    shape: tuple[str, ...]
    """Names of its dimensions, as `dimension` knows them."""

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        return (tuple(dimension(architecture, name) for name in self.shape),)


@dataclass(frozen=True)
class VocabRows(Copy):
    """A row per token. Megatron may hold padding rows after the last token; they do not reach Hugging Face."""

    shape: tuple[str, ...] = ("vocab", "hidden")
    untied_only: bool = False
    """Absent where the output layer shares the embedding."""

    def applies(self, architecture: Architecture) -> bool:
        tied = architecture.share_embeddings_and_output_weights
        return super().applies(architecture) and not (self.untied_only and tied)


@dataclass(frozen=True)
class FusedQKV(TensorMapping):
    """Query, key and value projections in one, [q_1 .. q_R; k; v] for each key/value head; weights or biases."""

    columns: tuple[str, ...] = ("hidden",)
    """Dimensions after the rows; () for a bias."""

    def parts(self) -> tuple[str, ...]:
        return tuple(self.hf.replace("{qkv}", letter) for letter in "qkv")

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        columns = [dimension(architecture, name) for name in self.columns]
        return tuple((dimension(architecture, rows), *columns) for rows in ("query", "key", "key"))

    def runs(self, architecture: Architecture) -> list[Run]:
        groups = architecture.num_query_groups
        counts = [dimension(architecture, rows) // groups for rows in ("query", "key", "key")]
        return [Run(part, group * count, count) for group in range(groups) for part, count in enumerate(counts)]


@dataclass(frozen=True)
class GatedQKV(FusedQKV):
    """The same with a gate for each query head: [q_1 .. q_R; gate_1 .. gate_R; k; v] of each key/value head.

    Hugging Face's q_proj has a head's query and then its gate.
    """

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        (query, *columns), *rest = super().part_shapes(architecture)
        return ((2 * query, *columns), *rest)

    def runs(self, architecture: Architecture) -> list[Run]:
        groups, head = architecture.num_query_groups, architecture.kv_channels
        heads = architecture.num_attention_heads // groups
        runs = []
        for group in range(groups):
            first = group * heads
            for gate in (0, 1):
                runs += [Run(0, (2 * (first + number) + gate) * head, head) for number in range(heads)]
            runs += [Run(part, group * head, head) for part in (1, 2)]
        return runs


@dataclass(frozen=True)
class KeyHeadRows(TensorMapping):
    """What a gated delta net has for each of its key heads, one key head after the other; `hf` begins the names.

    So each tensor-parallel rank has the rows of its own heads, one below the other.
    """

    tensors: tuple[tuple[str, tuple[str, ...]], ...]
    """Hugging Face's tensors, and the kinds of rows that each has: "query", "key", "value", "gate", "rate", "decay"."""
    columns: tuple[str, ...] = ("hidden",)
    """Dimensions after the rows."""
    together: bool = False
    """Whether Hugging Face has the rows of one key head together, too; otherwise all of one kind."""

    def parts(self) -> tuple[str, ...]:
        return tuple(f"{self.hf}.{name}" for name, _ in self.tensors)

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        net = architecture.delta_net
        assert net is not None
        rows, columns = net.rows_of_key_head, [dimension(architecture, name) for name in self.columns]
        return tuple(
            (net.linear_num_key_heads * sum(rows[kind] for kind in kinds), *columns) for _, kinds in self.tensors
        )

    def runs(self, architecture: Architecture) -> list[Run]:
        net = architecture.delta_net
        assert net is not None
        rows, heads = net.rows_of_key_head, net.linear_num_key_heads
        runs = []
        for head in range(heads):
            for part, (_, kinds) in enumerate(self.tensors):
                width, before = sum(rows[kind] for kind in kinds), 0
                for kind in kinds:
                    start = head * width + before if self.together else heads * before + head * rows[kind]
                    runs.append(Run(part, start, rows[kind]))
                    before += rows[kind]
        return runs


@dataclass(frozen=True)
class PackedQKV(FusedQKV):
    """The same where Hugging Face has one tensor too, of other rows: all queries, then all keys, then all values."""

    def parts(self) -> tuple[str, ...]:
        return (self.hf,)

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        shapes = super().part_shapes(architecture)
        return ((sum(shape[0] for shape in shapes), *shapes[0][1:]),)

    def runs(self, architecture: Architecture) -> list[Run]:
        query, key = dimension(architecture, "query"), dimension(architecture, "key")
        first = (0, query, query + key)
        return [Run(0, first[part] + start, rows) for part, start, rows in super().runs(architecture)]


@dataclass(frozen=True)
class GateUp(TensorMapping):
    """The two input projections of a gated feed-forward unit in one: [gate; up] rows."""

    width: str = "ffn"
    """Name of the dimension of either."""
    names: tuple[str, str] = ("gate", "up")
    """What stands for "{gate_up}"."""
    columns: tuple[str, ...] = ("hidden",)
    """Dimensions after the rows; () for a bias."""

    def parts(self) -> tuple[str, ...]:
        return tuple(self.hf.replace("{gate_up}", name) for name in self.names)

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        columns = [dimension(architecture, name) for name in self.columns]
        return ((dimension(architecture, self.width), *columns),) * 2

    def read_apart(self, architecture: Architecture) -> list[list[Run]]:
        return [[run] for run in self.runs(architecture)]


@dataclass(frozen=True)
class PackedGateUp(GateUp):
    """The same where Hugging Face has one tensor too, of the same rows."""

    def parts(self) -> tuple[str, ...]:
        return (self.hf,)

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        return ((2 * dimension(architecture, self.width), architecture.hidden_size),)

    def runs(self, architecture: Architecture) -> list[Run]:
        rows = dimension(architecture, self.width)
        return [Run(0, 0, rows), Run(0, rows, rows)]


@dataclass(frozen=True)
class ExpertStack(TensorMapping):
    """A weight of all experts of a layer, one tensor of either side; Hugging Face's columns are Megatron's rows.

    No rows of one are rows of the other: such a tensor is computed, expert by expert, and not moved.
    """

    rows: str
    """Name of the dimension of Megatron's rows; of gate and of up where there are both."""
    columns: str | None
    """Name of the dimension of Megatron's columns; None for a bias."""
    gated: bool = False
    """Whether the rows are those of gate and then those of up, which alternate in Hugging Face's tensor."""

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        experts, rows, *columns = self.megatron_shape(architecture)
        return ((experts, *columns, rows),)

    def megatron_shape(self, architecture: Architecture) -> Shape:
        columns = () if self.columns is None else (dimension(architecture, self.columns),)
        rows = dimension(architecture, self.rows) * (2 if self.gated else 1)
        return (dimension(architecture, "experts"), rows, *columns)

    def from_hf(self, tensor: Tensor) -> Tensor:
        """Make Megatron's tensor of some experts -> [experts, rows, columns]."""
        if self.columns is not None:
            tensor = tensor.transpose(1, 2)
        return _joined([tensor[:, ::2], tensor[:, 1::2]], dim=1) if self.gated else tensor.contiguous()

    def to_hf(self, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
        if self.gated:
            experts, rows, *columns = tensor.shape
            tensor = tensor.reshape(experts, 2, rows // 2, *columns).transpose(1, 2).reshape(tensor.shape)
        return (tensor.contiguous() if self.columns is None else tensor.transpose(1, 2).contiguous(),)
