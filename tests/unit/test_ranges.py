"""Proves that every numeric setting of every command has a range, and that what lies outside is refused by name.

The table is made from the dataclasses: a number that is added without a range fails here.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_sppo import config
from megatron_sppo.commands import convert, import_preferences
from megatron_sppo.config_fields import Range, leaves_of
from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.config import EvaluateConfig, ScoreConfig
from megatron_sppo.model.transformer_config import parse_overrides
from megatron_sppo.objective.names import parse_baseline
from megatron_sppo.planning.config import PlanConfig
from megatron_sppo.rollout.config import GenerateConfig, Sampling
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.training.config import InspectionConfig, TrainingConfig

COMMANDS: dict[str, type] = {
    **{
        kind.__name__: kind
        for kind in (TrainingConfig, InspectionConfig, PlanConfig, SelfPlayConfig, GenerateConfig, EvaluateConfig)
    },
    **convert.COMMANDS,
    "score": ScoreConfig,
    "import_preferences": import_preferences.Command,
}


def parts(annotation: Any) -> Iterator[Any]:
    """Take an annotation apart -> its plain types and its ranges."""
    if isinstance(annotation, (type, Range)) and not typing.get_args(annotation):
        yield annotation
    elif typing.get_origin(annotation) is not Literal:
        for part in typing.get_args(annotation):
            yield from parts(part)


def numbers() -> Iterator[tuple[str, tuple[str, ...], type, list[Range]]]:
    for command, kind in COMMANDS.items():
        for leaf in leaves_of(kind).values():
            annotation = owner_hints(kind, leaf.path)
            found = list(parts(annotation))
            if number := next((kind for kind in (float, int) if kind in found), None):
                yield command, leaf.path, number, [part for part in found if isinstance(part, Range)]


def owner_hints(kind: type, path: tuple[str, ...]) -> Any:
    for name in path[:-1]:
        kind = typing.get_type_hints(kind)[name]
    return typing.get_type_hints(kind, include_extras=True)[path[-1]]


NUMBERS = list(numbers())
ASKED_FOR = {
    "InspectionConfig": ["--reference=there"],
    "SelfPlayConfig": ["--training", "lr=1e-6"],
    "EvaluateConfig": ["--policy=there", "--base=there", "--previous=there"],
    "import": ["--hf=there"],
    "export": ["--hf=there"],
    "score": ["--rollouts=there", "--judge=rules:concise"],
}
"""By command, what it asks for though it may be left out."""
REQUIRED = {Path: "there", str: "x", float: "1e-6", int: "2"}


def parse(command: str, *argv: str, but: str) -> Any:
    """Parse a command line that has all that is required, each with a plain value."""
    kind = COMMANDS[command]
    given: list[str] = []
    for name, leaf in leaves_of(kind).items():
        if leaf.required and name != but:
            plain = next(part for part in parts(owner_hints(kind, leaf.path)) if part in REQUIRED)
            given.append(f"--{name.replace('_', '-')}={REQUIRED[plain]}")
    return config.parse(kind, name=command, description="", argv=[*given, *argv])


def test_the_table_is_not_empty() -> None:
    names = {path[-1] for _, path, _, _ in NUMBERS}
    assert {"eta", "lr", "temperature", "num_epochs", "hbm_gb_per_s", "workers"} <= names
    assert len(NUMBERS) > 80


@functools.cache
def parsed(command: str) -> Any:
    return parse(command, *ASKED_FOR.get(command, ()), but="")


def named(value: Any) -> str | None:
    return ".".join(value) if isinstance(value, tuple) else None


@pytest.mark.parametrize(("command", "path", "number", "ranges"), NUMBERS, ids=named)
def test_numbers_outside_their_range_are_refused_by_name(
    command: str, path: tuple[str, ...], number: type, ranges: list[Range]
) -> None:
    """On the command line, which takes a tenth of a second, one of them; in the dataclass that it makes, each."""
    name = path[-1]
    assert len(ranges) == 1, f"{name} of {command} has no range"
    (allowed,) = ranges
    outside = [number(allowed.most * 4 + 4), number(allowed.least - 1)]
    outside += [math.nan, math.inf, -math.inf] if number is float else []
    owner, flag = functools.reduce(getattr, path[:-1], parsed(command)), name.replace("_", "-")
    refused = rf"^{name} is .* must be a number in .*--{flag}\b"
    several = isinstance(getattr(owner, name), tuple)
    for value in outside:
        with pytest.raises(ConfigError, match=refused):
            dataclasses.replace(owner, **{name: (value,) if several else value})
    with pytest.raises(ConfigError, match=refused):
        parse(command, f"--{flag}={outside[-1]}", but=name)


def test_a_yaml_file_is_held_to_the_same_ranges(tmp_path: Path) -> None:
    for text in ("eta: nan", "objective: {eta: nan}", "eta: -1", "beta: inf"):
        file = tmp_path / "settings.yaml"
        file.write_text(text + "\n")
        with pytest.raises(ConfigError, match=r"^(eta|beta) is .* must be a number in \(0, "):
            parse("TrainingConfig", "--config", str(file), but="")


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(0, 1), (0, 0.5, 1), (-1e-9, 1.0001, float("nan"), float("inf"))),
        (Range(0, 1, above=True), (1e-300, 1), (0, -0.0)),
        (Range(0, 1, below=True), (0, 0.999), (1,)),
    ],
)
def test_a_range_holds_its_bounds_unless_they_are_left_out(allowed: Range, inside: tuple, outside: tuple) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_numbers_inside_texts_are_finite_too() -> None:
    class Fields:
        __dataclass_fields__ = TrainingConfig.__dataclass_fields__

    for text in ("constant:nan", "constant:inf", "constant:-inf", "constant:1e99", "constant:-1e7"):
        with pytest.raises(ConfigError, match="baseline"):
            parse_baseline(text)
    for text in (".nan", ".inf", "-.inf", "nan", "inf", "1e999"):
        with pytest.raises(ConfigError, match="save is"):
            parse_overrides([f"save={text}"], Fields, flag="--x", taken={})
    assert parse_overrides(["save=1e-2"], Fields, flag="--x", taken={}) == {"save": 0.01}  # a text in YAML 1.1


def test_the_sampler_s_settings_are_held_where_no_command_line_is() -> None:
    good = {"num_responses": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "seed": 0}
    Sampling(**good)
    for name, value in (("temperature", float("nan")), ("top_p", 0.0), ("max_tokens", 0), ("seed", -1)):
        with pytest.raises(ConfigError, match=f"^{name} is"):
            Sampling(**{**good, name: value})
