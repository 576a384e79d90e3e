"""What the fields of a config say of themselves: ranges and marks; and every field as one flag, sections opened."""

import dataclasses
import enum
import functools
import math
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any

from megatron_sppo.errors import ConfigError

BUILT_IN = ("config", "debug", "help")


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, bounds included. NaN and infinities lie in no range."""

    least: float
    most: float
    above: bool = False
    """Leave `least` itself out."""
    below: bool = False
    """Leave `most` itself out."""

    def __contains__(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most) and math.isfinite(value)

    def __str__(self) -> str:
        return f"{'(' if self.above else '['}{self.least:.10g}, {self.most:.10g}{')' if self.below else ']'}"


_MOST = 2**31 - 1
"""Counts beyond it are typing errors, and overflow the int32 of indexed datasets and kernels."""
PositiveInt = Annotated[int, Range(1, _MOST)]
NonNegativeInt = Annotated[int, Range(0, _MOST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
PositiveFloat = Annotated[float, Range(0, 1e12, above=True)]
NonNegativeFloat = Annotated[float, Range(0, 1e12)]
Fraction = Annotated[float, Range(0, 1)]


class Mark(enum.Enum):
    """What a field's annotation says of it beside its type and range."""

    LAYOUT = "layout"
    TUNABLE = "tunable"
    DECIDES = "decides"
    POSITIONAL = "positional"


LAYOUT = Mark.LAYOUT
"""Marks a field (or a section) that decides where or how a run is computed, not what comes of it: a run that is resumed
may have another value there. What is not marked decides, and must be the same."""
TUNABLE = Mark.TUNABLE
"""Marks a field (or a section) that decides what comes of a run, and yet may change where one training run is resumed,
such as a lower rate after a loss that was not finite. Iterations of self-play must share it."""
DECIDES = Mark.DECIDES
"""Marks the exception within a section that is marked otherwise."""
POSITIONAL = Mark.POSITIONAL
"""Marks a field that may also be typed without its flag, before all flags, in the order of the fields."""


class HoldsSettings:
    """Base of the mark of a field that holds another command's config (`config.SettingsOf`)."""


def check_ranges(config: Any) -> None:
    """Refuse a number outside the range that its field's annotation names; called by each config's `__post_init__`.

    Raises:
        ConfigError: names the setting, its value, its range and a value that will do.
    """
    for field, found in _ranges(type(config)):
        value = getattr(config, field.name)
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if number is not None and number not in found:
                default, flag = default_of(field), flag_of(field.name)
                has_one = isinstance(default, (int, float))
                remedy = f"Use for example {flag} {default:.10g}" if has_one else f"Give {flag} such a number"
                raise ConfigError(f"{field.name} is {number}; it must be a number in {found}. {remedy}.")


def _ranges(config_class: type[Any]) -> tuple[tuple[dataclasses.Field[Any], Range], ...]:
    """Find the fields of a config that have a range -> (field, range) pairs, sections left to themselves."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return tuple(
        (field, found) for field in dataclasses.fields(config_class) for found in _ranges_in(hints[field.name])
    )


def _ranges_in(annotation: Any) -> Iterator[Range]:
    for member in typing.get_args(annotation):
        if isinstance(member, Range):
            yield member
        else:
            yield from _ranges_in(member)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One flag: where it lives in the config, and what it takes."""

    path: tuple[str, ...]
    annotation: Any
    default: Any
    mark: Mark | None = None
    """Its own, or else its section's."""
    is_settings: bool = False
    """Holds another command's config: its mark is a HoldsSettings."""

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING and not self.is_settings

    @property
    def is_switch(self) -> bool:
        return self.annotation is bool

    def takes(self, member: type) -> bool:
        """Whether the annotation is `member` or a union that has it."""
        if typing.get_origin(self.annotation) in (typing.Union, types.UnionType):
            return member in typing.get_args(self.annotation)
        return self.annotation is member

    @property
    def takes_many(self) -> bool:
        members = typing.get_args(self.annotation) if self.takes(type(None)) else (self.annotation,)
        return self.is_settings or any(typing.get_origin(member) in (tuple, list) for member in members)


def leaves_of(
    config_class: type[Any],
    path: tuple[str, ...] = (),
    default: Any = dataclasses.MISSING,
    *,
    mark: Mark | None = None,
) -> dict[str, Leaf]:
    """List every leaf field by its name, sections opened -> {snake_case name: leaf}."""
    assert dataclasses.is_dataclass(config_class), f"{config_class} is no dataclass"
    hints = typing.get_type_hints(config_class, include_extras=True)
    leaves: dict[str, Leaf] = {}
    for field in dataclasses.fields(config_class):
        annotation, marks = hints[field.name], list[Any]()
        if typing.get_origin(annotation) is Annotated:
            annotation, *marks = typing.get_args(annotation)
        own = next((found for found in marks if isinstance(found, Mark)), mark)
        value = default_of(field) if default is dataclasses.MISSING else getattr(default, field.name)
        here = (*path, field.name)
        is_settings = any(isinstance(mark, HoldsSettings) for mark in marks)
        if dataclasses.is_dataclass(annotation) and not is_settings:
            assert isinstance(annotation, type)
            found = leaves_of(annotation, here, value, mark=own)
        else:
            leaf = Leaf(path=here, annotation=annotation, default=value, mark=own, is_settings=is_settings)
            found = {field.name: leaf}
        for key, leaf in found.items():
            assert key not in BUILT_IN, f"{'.'.join(leaf.path)}: --{key} belongs to every tool; choose another name"
            assert key not in leaves, f"{flag_of(key)} would be both {leaf.path} and {leaves[key].path}; rename one"
            leaves[key] = leaf
    return leaves


def chosen(names: Collection[str], leaves: Mapping[str, Leaf]) -> set[str]:
    """Tell what somebody chose of the settings that a file names -> names.

    A section that is written out whole, as resolved configs have it, says nothing of what was chosen.
    """
    missing = {leaf.path[:-1] for name, leaf in leaves.items() if name not in names}
    return {name for name in names if leaves[name].path[:-1] in missing}


def check_given(config: Any, given: Collection[str], leaves: Mapping[str, Leaf]) -> None:
    """Let sections that have a `check_given` refuse what somebody gave and nothing reads, the default's value too.

    Raises:
        ConfigError: by the section.
    """
    for path in {leaf.path[:-1] for leaf in leaves.values()}:
        section = functools.reduce(getattr, path, config)
        if hasattr(section, "check_given"):
            section.check_given(given)


def value_of(config: Any, leaf: Leaf) -> Any:
    for name in leaf.path:
        config = getattr(config, name)
    return config


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def spell(value: Any) -> str:
    """Spell a setting's value as people type it -> text that reads back as the same: 5e-7, not 5e-07."""
    return re.sub(r"e([+-])0(\d)$", r"e\1\2", str(value)) if isinstance(value, float) else str(value)


def flag_of(name: str) -> str:
    """Spell a setting's name as the user types it: global_batch_size -> "--global-batch-size"."""
    return "--" + name.replace("_", "-")


def name_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
