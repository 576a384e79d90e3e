"""The rules that tie a Megatron-Core tensor to the Hugging Face tensors it is made of. Each owns both directions.

A family's table (families/<family>.py) is a tuple of these. A Megatron name with "{layer}" is one slice of a tensor
that Megatron-Core's distributed checkpoint stacks over layers: "decoder.layers.{layer}.mlp.linear_fc2.weight" is
[layer] of the key "decoder.layers.mlp.linear_fc2.weight", whose first axis counts layers. "{expert}" likewise: experts
are the second axis.
"""

# G = key/value heads, R = query heads per key/value head, d = head dimension, F = feed-forward, H = hidden, V = rows

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.safetensors_file import Shape
from megatron_sppo.errors import ConversionError


def dimension(architecture: Architecture, name: str) -> int:
    """Give the size of a named dimension.

    "hidden", "ffn", "gate_up" (two "ffn"), "query" (all heads), "key" (all key/value heads), "head", "vocab",
    "experts", "expert_ffn" (one).
    """
    return {
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "gate_up": 2 * architecture.ffn_hidden_size,
        "query": architecture.num_attention_heads * architecture.kv_channels,
        "key": architecture.num_query_groups * architecture.kv_channels,
        "head": architecture.kv_channels,
        "vocab": architecture.vocab_size,
        "experts": architecture.num_moe_experts or 0,
        "expert_ffn": architecture.moe_ffn_hidden_size or 0,
    }[name]


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and its Hugging Face tensors."""

    megatron: str
    """Megatron-Core's name; with "{layer}" where it belongs to a layer, and "{expert}" where to an expert of it."""
    hf: str
    """Hugging Face's name; with "{layer}" likewise."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron

    @property
    def key(self) -> str:
        """Megatron's key in the distributed checkpoint, layers and experts stacked."""
        return self.megatron.replace(".{layer}", "").replace(".{expert}", "")

    def stacked(self, architecture: Architecture) -> Shape:
        """Axes of the key before those of the tensor: layers, experts."""
        layers = (architecture.num_layers,) if self.per_layer else ()
        return (*layers, dimension(architecture, "experts")) if self.per_expert else layers

    def applies(self, architecture: Architecture) -> bool:
        """Whether a model of this architecture has the tensor."""
        return True

    def parts(self) -> tuple[str, ...]:
        """Hugging Face's names, layer and expert not yet filled in, in the order of `to_megatron`."""
        return (self.hf,)

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `parts`."""
        raise NotImplementedError

    def megatron_shape(self, architecture: Architecture) -> Shape:
        """Shape of the Megatron tensor, without the axes of layers and experts."""
        raise NotImplementedError

    def to_megatron(self, tensors: Sequence[Tensor], architecture: Architecture) -> Tensor:
        """Make the Megatron tensor -> [*megatron_shape]."""
        raise NotImplementedError

    def to_hf(self, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
        """Undo `to_megatron` -> tensors of `part_shapes`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Copy(Rule):
    """The same tensor under another name."""

    shape: tuple[str, ...]
    """Names of its dimensions, as `dimension` knows them."""

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        return (self.megatron_shape(architecture),)

    def megatron_shape(self, architecture: Architecture) -> Shape:
        return tuple(dimension(architecture, name) for name in self.shape)

    def to_megatron(self, tensors: Sequence[Tensor], architecture: Architecture) -> Tensor:
        return tensors[0]

    def to_hf(self, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class VocabRows(Copy):
    """A row per token. Megatron may hold padding rows after the last token; they do not reach Hugging Face."""

    shape: tuple[str, ...] = ("vocab", "hidden")
    untied_only: bool = False
    """Absent where the output layer shares the embedding."""

    def applies(self, architecture: Architecture) -> bool:
        return not (self.untied_only and architecture.share_embeddings_and_output_weights)


@dataclass(frozen=True)
class FusedQKV(Rule):
    """Query, key and value projections in one, [q_1 .. q_R; k; v] for each key/value head; weights or biases."""

    columns: tuple[str, ...] = ("hidden",)
    """Dimensions after the rows; () for a bias."""

    def parts(self) -> tuple[str, ...]:
        return tuple(self.hf.replace("{qkv}", letter) for letter in "qkv")

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        columns = tuple(dimension(architecture, name) for name in self.columns)
        return tuple((dimension(architecture, rows), *columns) for rows in ("query", "key", "key"))

    def megatron_shape(self, architecture: Architecture) -> Shape:
        columns = tuple(dimension(architecture, name) for name in self.columns)
        return (dimension(architecture, "query") + 2 * dimension(architecture, "key"), *columns)

    def to_megatron(self, tensors: Sequence[Tensor], architecture: Architecture) -> Tensor:
        groups = architecture.num_query_groups
        grouped = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]  # [G, R*d | d | d, H]
        return torch.cat(grouped, dim=1).reshape(self.megatron_shape(architecture))

    def to_hf(self, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
        groups, head = architecture.num_query_groups, architecture.kv_channels
        queries = architecture.num_attention_heads // groups * head
        grouped = tensor.reshape(groups, queries + 2 * head, *tensor.shape[1:])
        split = torch.split(grouped, [queries, head, head], dim=1)
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part in split)


@dataclass(frozen=True)
class PackedQKV(FusedQKV):
    """The same where Hugging Face has one tensor too, of other rows: all queries, then all keys, then all values."""

    def parts(self) -> tuple[str, ...]:
        return (self.hf,)

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        return (self.megatron_shape(architecture),)

    def to_megatron(self, tensors: Sequence[Tensor], architecture: Architecture) -> Tensor:
        rows = [dimension(architecture, name) for name in ("query", "key", "key")]
        return super().to_megatron(torch.split(tensors[0], rows), architecture)

    def to_hf(self, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
        return (torch.cat(super().to_hf(tensor, architecture)),)


@dataclass(frozen=True)
class GateUp(Rule):
    """The two input projections of a gated feed-forward unit in one: [gate; up] rows."""

    width: str = "ffn"
    """Name of the dimension of either."""
    names: tuple[str, str] = ("gate", "up")
    """What stands for "{gate_up}"."""

    def parts(self) -> tuple[str, ...]:
        return tuple(self.hf.replace("{gate_up}", name) for name in self.names)

    def part_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        return ((dimension(architecture, self.width), architecture.hidden_size),) * 2

    def megatron_shape(self, architecture: Architecture) -> Shape:
        return (2 * dimension(architecture, self.width), architecture.hidden_size)

    def to_megatron(self, tensors: Sequence[Tensor], architecture: Architecture) -> Tensor:
        return torch.cat(list(tensors))

    def to_hf(self, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
        return torch.split(tensor, dimension(architecture, self.width))


@dataclass(frozen=True, kw_only=True)
class ExpertKeys:
    """Where a family's config.json says what its experts are."""

    count: tuple[str, ...]
    """Spellings of the key for the number of experts; the first is written."""
    width: str
    """Key of one expert's feed-forward channels."""
    chosen: str = "num_experts_per_tok"
    normalised: str | None = None
    """Boolean key that says whether the chosen experts' weights are made to add up to 1; absent means false. None: they
    always are."""


@dataclass(frozen=True, kw_only=True)
class WindowKeys:
    """How a family's config.json says which layers see `sliding_window` tokens only."""

    switch: str | None = None
    """Boolean key without which there is no window, whatever `sliding_window` says."""
    first_layer: str | None = None
    """Key of the first layer, from 0, that has the window; None: layer 0."""
    every: int = 1
    """From there on each layer has it, or every second one."""
    layer_types: bool = False
    """Whether transformers goes by `layer_types` where it is given. Where it overlooks it, the two must agree."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: what its config.json must say, and its rules."""

    model_type: str
    """`model_type` of config.json, and the name of the table."""
    architecture_class: str
    """`architectures[0]` of config.json."""
    rules: tuple[Rule, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    """Keys of config.json that change the computation, and the values this table stands for (None: absent or null)."""
    required: tuple[str, ...] = ()
    """Keys that must be there (they may be null), for without them transformers would take another value than we."""
    ignored: tuple[str, ...] = ()
    """Ends of tensor names that old checkpoints carry and that hold no weights, such as RoPE's frequencies."""
    traits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Architecture` that every model of the family has alike, such as {"add_qkv_bias": True}."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json with a number above 0, or null, and the fields of `Architecture` that take it as it is."""
    windows: WindowKeys | None = None
    """None in a family whose every layer sees all tokens up to its own."""
    rotary_base: float = 10000.0
    """RoPE's base where config.json names none."""
    tied: bool = False
    """Whether the output layer shares the embedding where config.json does not say."""
    experts: ExpertKeys | None = None
    """None in a dense family."""


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A rule at its place in one model: names and shapes filled in."""

    rule: Rule
    layer: int | None
    expert: int | None
    hf_shapes: Mapping[str, Shape] = field(hash=False)
    """Hugging Face's names and shapes, in the order that the rule takes them."""

    @property
    def megatron_name(self) -> str:
        return self.rule.megatron.replace("{layer}", str(self.layer)).replace("{expert}", str(self.expert))

    @property
    def index(self) -> tuple[int, ...]:
        """The tensor's place on the stacked axes of its key."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)


def bind(family: Family, architecture: Architecture) -> tuple[Binding, ...]:
    """Lay a family's table over a model -> one binding per Megatron tensor, layer and expert.

    In the order of embedding, layers, the rest.

    Raises:
        ConversionError: two rules claim one Hugging Face tensor or one Megatron key.
    """
    bindings: list[Binding] = []
    rules = [rule for rule in family.rules if rule.applies(architecture)]
    first_layer_rule = next(i for i, rule in enumerate(rules) if rule.per_layer)
    before = rules[:first_layer_rule]
    after = [rule for rule in rules[first_layer_rule:] if not rule.per_layer]
    bindings += [_binding(rule, architecture, None, None) for rule in before]
    for layer in range(architecture.num_layers):
        for rule in rules:
            if rule.per_expert:
                experts = range(dimension(architecture, "experts"))
                bindings += [_binding(rule, architecture, layer, expert) for expert in experts]
            elif rule.per_layer:
                bindings.append(_binding(rule, architecture, layer, None))
    bindings += [_binding(rule, architecture, None, None) for rule in after]
    _check_no_double(bindings, family)
    return tuple(bindings)


def hf_shapes(bindings: Sequence[Binding]) -> dict[str, Shape]:
    """List the Hugging Face tensors of a model -> {name: shape}, in the bindings' order."""
    return {name: shape for binding in bindings for name, shape in binding.hf_shapes.items()}


def megatron_shapes(bindings: Sequence[Binding], architecture: Architecture) -> dict[str, Shape]:
    """List the keys of the distributed checkpoint -> {key: global shape}, layers as the first axis, then experts."""
    rules = dict.fromkeys(binding.rule for binding in bindings)
    return {rule.key: (*rule.stacked(architecture), *rule.megatron_shape(architecture)) for rule in rules}


def _binding(rule: Rule, architecture: Architecture, layer: int | None, expert: int | None) -> Binding:
    names = [name.replace("{layer}", str(layer)).replace("{expert}", str(expert)) for name in rule.parts()]
    shapes = dict(zip(names, rule.part_shapes(architecture), strict=True))
    return Binding(rule=rule, layer=layer, expert=expert, hf_shapes=shapes)


def _check_no_double(bindings: Sequence[Binding], family: Family) -> None:
    for names in (list(_all_hf_names(bindings)), [binding.megatron_name for binding in bindings]):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise ConversionError(
                    f"two rules of the family {family.model_type!r} claim {name!r}. "
                    f"Mend megatron_sppo/conversion/families/{family.model_type}.py."
                )
            seen.add(name)


def _all_hf_names(bindings: Sequence[Binding]) -> Iterator[str]:
    for binding in bindings:
        yield from binding.hf_shapes
