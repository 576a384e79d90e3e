"""A family's table laid over one model: each tensor with its names, shapes and places filled in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.safetensors_file import Shape
from megatron_sppo.conversion.family import Family
from megatron_sppo.conversion.mapping import TensorMapping, dimension
from megatron_sppo.errors import ConversionError


class Place(NamedTuple):
    """Where a tensor lies in a distributed checkpoint: a slice of a key's tensor."""

    key: str
    offsets: tuple[int, ...]
    """On the axes of the key that stack layers and experts."""
    stacked: Shape
    """Sizes of these axes."""


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A mapping at its place in one model: names and shapes filled in."""

    mapping: TensorMapping
    index: tuple[int, ...]
    """The tensor's numbers: (), (layer,) or (layer, expert)."""
    hf_shapes: Mapping[str, Shape] = field(hash=False)
    """Hugging Face's names and shapes, in the order of the mapping's parts."""
    places: tuple[Place, ...] = field(hash=False)
    """Where Megatron-Core may have put it; the first is where it puts it by its defaults."""

    @property
    def megatron_name(self) -> str:
        return _filled_in(self.mapping.megatron, self.index)

    @property
    def place(self) -> Place:
        """Where it is written."""
        return self.places[0]


def bind(family: Family, architecture: Architecture) -> tuple[Binding, ...]:
    """Lay a family's table over a model -> one binding per Megatron tensor, layer and expert.

    In the order of embedding, layers, the rest.

    Raises:
        ConversionError: two mappings claim one Hugging Face tensor or one Megatron key.
    """
    table = [mapping for mapping in family.mappings if mapping.applies(architecture)]
    layers = [mapping for mapping in table if mapping.per_layer]
    before = list(itertools.takewhile(lambda mapping: not mapping.per_layer, table))
    after = [mapping for mapping in table[len(before) :] if not mapping.per_layer]
    bindings = [_binding(mapping, architecture, ()) for mapping in before]
    places: Sequence[tuple[int, ...]]
    for layer in range(architecture.num_layers):
        for mapping in layers:
            if mapping.in_layer(architecture, layer):
                experts = range(dimension(architecture, "experts"))
                places = [(layer, expert) for expert in experts] if mapping.per_expert else [(layer,)]
                bindings += [_binding(mapping, architecture, place) for place in places]
    bindings += [_binding(mapping, architecture, ()) for mapping in after]
    _check_no_double((name for binding in bindings for name in binding.hf_shapes), family)
    _check_no_double((binding.megatron_name for binding in bindings), family)
    return tuple(bindings)


def _places(mapping: TensorMapping, architecture: Architecture, index: tuple[int, ...]) -> tuple[Place, ...]:
    """List the forms of a tensor's key, the one of Megatron-Core's defaults first.

    mcore 0.16.1 and 0.19.2 (transformer_block.py, sharded_state_dict) stack layers, but not where they are of several
    kinds ("non-homogeneous": moe_layer_freq or linear_attention_freq is a list); experts are stacked unless
    `singleton_local_shards` is set.
    """
    sizes = (architecture.num_layers, dimension(architecture, "experts"))[: len(index)]
    by_layer = _filled_in(mapping.megatron.replace(".{expert}", ""), index[:1])
    stacked, unstacked = Place(mapping.key, index, sizes), Place(by_layer, index[1:], sizes[1:])
    alone = Place(_filled_in(mapping.megatron, index), (), ())
    forms = (unstacked, stacked, alone) if architecture.layers_differ and index else (stacked, unstacked, alone)
    return tuple(dict.fromkeys(forms))


def hf_shapes(bindings: Sequence[Binding]) -> dict[str, Shape]:
    """List the Hugging Face tensors of a model -> {name: shape}, in the bindings' order."""
    return {name: shape for binding in bindings for name, shape in binding.hf_shapes.items()}


def megatron_shapes(bindings: Sequence[Binding], architecture: Architecture) -> dict[str, Shape]:
    """List the keys of the distributed checkpoint -> {key: global shape}, stacked axes first: layers, then experts."""
    shapes: dict[str, Shape] = {}
    for binding in bindings:
        if binding.place.key not in shapes:
            shapes[binding.place.key] = (*binding.place.stacked, *binding.mapping.megatron_shape(architecture))
    return shapes


def _binding(mapping: TensorMapping, architecture: Architecture, index: tuple[int, ...]) -> Binding:
    names = [_filled_in(name, index) for name in mapping.parts()]
    shapes = dict(zip(names, mapping.part_shapes(architecture), strict=True))
    return Binding(mapping=mapping, index=index, hf_shapes=shapes, places=_places(mapping, architecture, index))


def _filled_in(name: str, index: tuple[int, ...]) -> str:
    for place, number in zip(("{layer}", "{expert}"), index, strict=False):
        name = name.replace(place, str(number))
    return name


def _check_no_double(names: Iterable[str], family: Family) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConversionError(
                f"two mappings of the family {family.model_type!r} claim {name!r}. "
                f"Correct megatron_sppo/conversion/families/{family.model_type}.py."
            )
        seen.add(name)
