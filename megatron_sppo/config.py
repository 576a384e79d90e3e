"""Dataclasses <-> command line <-> YAML, in one place.

A config is a frozen dataclass whose fields may be dataclasses ("sections"). Every leaf is one flat flag in Megatron's
kebab-case. `--config FILE.yaml` holds the same names in snake_case, grouped by section or flat. A YAML value becomes
the tokens that a user would have typed, put before the user's own: one path validates both, and the later one wins.
A number's annotation says what it may be (`PositiveInt`, `Annotated[float, Range(0, 1)]`), and `check_ranges` holds it.
`Annotated[PositiveInt, LAYOUT]` marks what a resumed run may change; `deciding` lists what it may not. A field marked
`SettingsOf` holds the config of another command, which one flag takes as NAME=VALUE.
"""

import contextlib
import dataclasses
import difflib
import enum
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
import yaml

from megatron_sppo.errors import ConfigError
from megatron_sppo.storage import atomic_file, own_or_packaged, packaged_examples

ConfigT = TypeVar("ConfigT")
logger = logging.getLogger(__name__)

_BUILT_IN = ("config", "debug", "help")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


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


class SettingsOf(tyro.constructors.PrimitiveConstructorSpec[Any]):
    """Marks a field that is another command's config: `Annotated[TrainingConfig, SettingsOf(TrainingConfig, ...)]`.

    Its flag takes NAME=VALUE (VALUE may be a list or mapping in YAML's flow style) or a JSON object, several times; in
    YAML it is a mapping, grouped by section or flat. What is typed is laid over what the file has.
    """

    def __init__(self, config_class: type[Any], *, name: str, decided: Mapping[str, Any], by: str) -> None:
        """Describe the field.

        Args:
            name: the field's own, for messages.
            decided: settings that the holder decides and nobody may set -> a stand-in, where the config needs one.
            by: the holder, for messages.
        """
        super().__init__(
            nargs="*",
            metavar="NAME=VALUE",
            instance_from_str=self._read,
            is_instance=lambda value: isinstance(value, config_class),
            str_from_instance=lambda _: [],
        )
        object.__setattr__(self, "config_class", config_class)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "decided", decided)
        object.__setattr__(self, "by", by)

    config_class: type[Any]
    name: str
    decided: Mapping[str, Any]
    by: str

    def _read(self, texts: Sequence[str]) -> Any:
        leaves, place = _leaves(self.config_class), f"section {self.name}"
        values: dict[str, Any] = {}
        for text in texts:
            values |= _leaf_values(self._content(text), leaves, place=place)
        if own := [name for name in values if name in self.decided]:
            raise ConfigError(f"{self.name} sets {own[0]}, which {self.by} decides itself. Remove it.")
        return _from_values(self.config_class, {**_plain_text(self.decided), **values}, leaves, place=place)

    def _content(self, text: str) -> dict[str, Any]:
        """Read NAME=VALUE or a JSON object -> {name: text, None, list or dict}, as YAML would hold it."""
        name, equals, value = text.partition("=")
        try:
            if text.startswith("{"):
                return dict(_plain_text(json.loads(text)))
            is_flow = value.startswith(("[", "{"))
            flow = yaml.load(value, Loader=_TextLoader) if is_flow else value  # noqa: S506 (texts alone)
        except (ValueError, yaml.YAMLError):
            raise ConfigError(f"{self.name} holds {text!r}, which is not YAML. Quote the value.") from None
        if not equals:
            raise ConfigError(
                f"{self.name} holds {text!r}. Write NAME=VALUE, or in YAML `{self.name}: {{NAME: VALUE}}`."
            )
        return {_snake(name): None if flow == "None" else flow}


def check_ranges(config: Any) -> None:
    """Refuse a number outside the range that its field's annotation names; called by each config's `__post_init__`.

    Raises:
        ConfigError: names the setting, its value, its range and a value that will do.
    """
    for field, found in _ranges(type(config)):
        value = getattr(config, field.name)
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if number is not None and number not in found:
                default, flag = _default_of(field), flag_of(field.name)
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


def parse(
    config_class: type[ConfigT],
    *,
    name: str,
    description: str,
    argv: Sequence[str] | None = None,
    of_file: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> ConfigT:
    """Read the command line and the YAML file that it names -> an instance of `config_class`.

    Args:
        config_class: frozen keyword-only dataclass; nested dataclasses are sections of the YAML and of the help.
        name: the tool's name in usage and help.
        description: what the tool does, for the help.
        argv: tokens after the program's name; None takes sys.argv's.
        of_file: turns the file's content (texts) into this command's, where the file may be another command's.

    Raises:
        ConfigError: an unknown flag or key, a missing or impossible value; also what `__post_init__` raises, unchanged.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    leaves = _leaves(config_class)
    if not {"-h", "--help"} & set(tokens):
        tokens = _check_flags(_with_flags(tokens, leaves), leaves)
        file = config_file(tokens)
        content = {} if file is None else _read_yaml(file)
        values = _leaf_values(content if of_file is None else of_file(content), leaves, place=str(file))
        from_file = {key: _tokens_of_value(key, leaves[key], value, place=f"{file}: ") for key, value in values.items()}
        _check_required(leaves, given=set(from_file) | _keys(tokens))
        for key in (key for key, leaf in leaves.items() if leaf.is_settings):
            tokens = _merged(flag_of(key), from_file.pop(key, [])[1:], tokens)
        _say_what_is_replaced(tokens, from_file, file)
        return _construct(
            config_class, name, description, [t for group in from_file.values() for t in group], tokens, str(file)
        )
    return _construct(config_class, name, description, [], ["--help"], "")


def from_dict(config_class: type[ConfigT], content: Mapping[str, Any], *, place: str) -> ConfigT:
    """Build a config from what `to_dict` made of one, JSON and back included, as `parse` does from a YAML file.

    Raises:
        ConfigError: as `parse`; `place` names where the content stands.
    """
    leaves = _leaves(config_class)
    return _from_values(config_class, _leaf_values(_plain_text(content), leaves, place=place), leaves, place=place)


def _say_what_is_replaced(tokens: Sequence[str], from_file: Mapping[str, list[str]], file: Path | None) -> None:
    """Warn where a typed list takes the place of the file's, and names settings of it no more."""
    for flag, *values in from_file.values():
        if flag not in tokens or not values:
            continue
        typed = itertools.takewhile(lambda token: not token.startswith("--"), tokens[tokens.index(flag) + 1 :])
        names = {value.partition("=")[0] for value in typed}
        if lost := [value.partition("=")[0] for value in values if value.partition("=")[0] not in names]:
            logger.warning("%s replaces what %s sets there: %s no longer set", flag, file, ", ".join(lost))


def parse_command(
    commands: Mapping[str, type[Any]], *, name: str, description: str, argv: Sequence[str] | None = None
) -> Any:
    """Read `COMMAND [flags]` -> an instance of that command's config class.

    Raises:
        ConfigError: no command or an unknown one; and as `parse`.
    """
    summaries = {command: _summary(config_class) for command, config_class in commands.items()}
    chosen, rest = take_command(summaries, name=name, description=description, argv=argv)
    return parse(commands[chosen], name=f"{name} {chosen}", description=summaries[chosen], argv=rest)


def take_command(
    summaries: Mapping[str, str], *, name: str, description: str, argv: Sequence[str] | None = None
) -> tuple[str, list[str]]:
    """Take the command off the front of a command line -> (command, the tokens behind it); --help lists them all.

    Raises:
        ConfigError: no command or an unknown one.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    if debug := list(itertools.takewhile(lambda token: token == "--debug", tokens)):
        tokens = tokens[len(debug) :]
        tokens += debug if tokens else []
    if not tokens or tokens[0] not in (*summaries, "-h", "--help"):
        near = _nearest(tokens[0], list(summaries)) if tokens else ""
        fact = f"no command {tokens[0]!r}. {near}" if tokens else "a command is missing. "
        known = ", ".join(f"{name} {command}" for command in summaries)
        raise ConfigError(f"{fact}Use one of: {known} (each has --help).")
    if tokens[0] in summaries:
        return tokens[0], tokens[1:]
    width = max(map(len, summaries))
    lines = "".join(f"  {command:{width}}  {summary}\n" for command, summary in summaries.items())
    sys.stdout.write(f"usage: {name} COMMAND [OPTIONS]\n\n{description}\n\ncommands:\n{lines}\n")
    sys.stdout.write(f"`{name} COMMAND --help` lists the options of one.\n")
    raise SystemExit(0)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into what JSON and YAML hold -> nested dict, sections as dicts, paths as text, tuples as lists."""
    assert dataclasses.is_dataclass(config)
    marks = typing.get_type_hints(type(config), include_extras=True)
    values = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    for name, settings in values.items():
        for mark in typing.get_args(marks[name]):
            if isinstance(mark, SettingsOf):  # what the holder decides is not the field's to say
                values[name] = {key: value for key, value in settings.items() if key not in mark.decided}
    return values


def deciding(config: Any, *, free: Collection[Mark] = (LAYOUT,)) -> dict[str, Any]:
    """List what must be the same when a run is resumed: every setting whose mark is not `free` -> {dotted path: value}.

    Paths are sections and name, such as "optimization.lr"; values as `to_dict` spells them.
    """
    found: dict[str, Any] = {}
    for leaf in _leaves(type(config)).values():
        path, value = ".".join(leaf.path), _value_of(config, leaf)
        if leaf.is_settings:
            found |= {f"{path}.{name}": setting for name, setting in deciding(value, free=free).items()}
        elif leaf.mark not in free:
            found[path] = _plain(value)
    return found


def write_yaml(config: Any, path: Path) -> None:
    """Write the resolved config, atomically. `--config PATH` of the same tool reads an equal config back."""
    with atomic_file(Path(path)) as file:
        yaml.safe_dump(to_dict(config), file, sort_keys=False, allow_unicode=True)


def is_written_of(config: Any, path: Path) -> bool:
    """Whether a file is one that `write_yaml` wrote of a config of this class, and not somebody's own settings."""
    try:
        return list(_read_yaml(path)) == list(to_dict(config))
    except ConfigError:
        return False


def to_flags(config: Any) -> list[str]:
    """Spell a config as command-line tokens, for a child process that takes the same flags -> list of tokens.

    Values that equal the default are left out; what the child lacks is its own ConfigError.
    """
    flags: list[str] = []
    for key, leaf in _leaves(type(config)).items():
        value = _value_of(config, leaf)
        if leaf.required or value != leaf.default:
            flags += _tokens_of_value(key, leaf, _plain_text(value), place="")
    return flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
    """One flag: where it lives in the config, and what it takes."""

    path: tuple[str, ...]
    annotation: Any
    default: Any
    mark: Mark | None = None
    """Its own, or else its section's."""
    is_settings: bool = False
    """Holds another command's config: marked SettingsOf."""

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


def _leaves(
    config_class: type[Any],
    path: tuple[str, ...] = (),
    default: Any = dataclasses.MISSING,
    *,
    mark: Mark | None = None,
) -> dict[str, _Leaf]:
    """List every leaf field by its name, sections opened -> {snake_case name: leaf}."""
    assert dataclasses.is_dataclass(config_class), f"{config_class} is no dataclass"
    hints = typing.get_type_hints(config_class, include_extras=True)
    leaves: dict[str, _Leaf] = {}
    for field in dataclasses.fields(config_class):
        annotation, marks = hints[field.name], list[Any]()
        if typing.get_origin(annotation) is Annotated:
            annotation, *marks = typing.get_args(annotation)
        own = next((found for found in marks if isinstance(found, Mark)), mark)
        value = _default_of(field) if default is dataclasses.MISSING else getattr(default, field.name)
        here = (*path, field.name)
        is_settings = any(isinstance(mark, SettingsOf) for mark in marks)
        if dataclasses.is_dataclass(annotation) and not is_settings:
            assert isinstance(annotation, type)
            found = _leaves(annotation, here, value, mark=own)
        else:
            leaf = _Leaf(path=here, annotation=annotation, default=value, mark=own, is_settings=is_settings)
            found = {field.name: leaf}
        for key, leaf in found.items():
            assert key not in _BUILT_IN, f"{'.'.join(leaf.path)}: --{key} belongs to every tool; choose another name"
            assert key not in leaves, f"{flag_of(key)} would be both {leaf.path} and {leaves[key].path}; rename one"
            leaves[key] = leaf
    return leaves


def _value_of(config: Any, leaf: _Leaf) -> Any:
    for name in leaf.path:
        config = getattr(config, name)
    return config


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _with_flags(tokens: list[str], leaves: Mapping[str, _Leaf]) -> list[str]:
    """Put the flags of positional settings before what is typed without them, wherever it stands -> tokens."""
    typed = {_snake(token.partition("=")[0]) for token in tokens}
    left = [key for key, leaf in leaves.items() if leaf.mark is POSITIONAL and key not in typed]
    found, of_flag = list[str](), 0.0
    for token in tokens:
        if token.startswith("-"):
            of_flag = _num_values(token, leaves)
        elif of_flag:
            of_flag -= 1
        elif left:
            found.append(flag_of(left.pop(0)))
        found.append(token)
    return found


def _num_values(token: str, leaves: Mapping[str, _Leaf]) -> float:
    """Count the tokens behind a flag that are its values, at most -> 0, 1, or infinity."""
    leaf, switch = leaves.get(_snake(token)), leaves.get(_snake(token).removeprefix("no_"))
    if "=" in token or token in ("--debug", "--help", "-h") or (switch is not None and switch.is_switch):
        return 0
    return math.inf if leaf is not None and leaf.takes_many else 1


def _check_flags(tokens: list[str], leaves: Mapping[str, _Leaf]) -> list[str]:
    """Refuse flags that do not exist, naming the nearest one that does -> the tokens, in kebab-case."""
    checked = []
    for token in tokens:
        if not token.startswith("--") or token == "--":
            checked.append(token)
            continue
        flag, equals, value = token.partition("=")
        key = _snake(flag)
        switch = key.removeprefix("no_") if key not in leaves else key
        known = key in leaves or key in _BUILT_IN or (switch in leaves and leaves[switch].is_switch)
        if not known:
            raise ConfigError(f"unknown flag {flag}. {_nearest(flag, _all_flags(leaves))}Run with --help for the list.")
        if equals and (key == "debug" or (switch in leaves and leaves[switch].is_switch)):
            raise ConfigError(f"{token}: {flag} takes no value. Use {flag_of(switch)} or {flag_of('no_' + switch)}.")
        checked.append(flag_of(key) + equals + value)
    return checked


def _check_required(leaves: Mapping[str, _Leaf], *, given: set[str], within: str = "") -> None:
    missing = [key for key, leaf in leaves.items() if leaf.required and key not in given]
    if missing:
        flags = ", ".join(flag_of(key) for key in missing)
        verb, pronoun = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise ConfigError(
            f"{flags} {verb} missing. Give {pronoun} on the command line or in the --config file{within}."
        )


def config_file(tokens: Sequence[str]) -> Path | None:
    """Find the one `--config FILE` -> path or None."""
    files = [token.partition("=")[2] for token in tokens if token.startswith("--config=")]
    for position, token in enumerate(tokens):
        if token == "--config":
            following = tokens[position + 1 : position + 2]
            if not following or following[0].startswith("--"):
                raise ConfigError("--config needs a file. Use --config FILE.yaml.")
            files += following
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times ({', '.join(files)}). Give one file.")
    return own_or_packaged(Path(files[0])) if files else None


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars stay as written ("1e-6", "no", "007"): the flag's type reads them. Plain null is None."""

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        return None if node.style is None and text in ("null", "Null", "NULL", "None", "~", "") else text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is given twice", problem_mark=node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep=deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML mapping of texts -> dict; empty file, empty dict."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_TextLoader)  # noqa: S506 (texts alone)
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist. Give an existing YAML file to --config; in the package are "
            f"{packaged_examples('configs/*.yaml')}."
        ) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}). Give a readable YAML file to --config.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text. Give a YAML file to --config.") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(f"{file}{line}: {error.problem}. Fix the YAML there.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML ({str(error).splitlines()[0]}). Fix it.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, not `key: value` lines. Write one setting a line.")
    return content


def _leaf_values(content: Mapping[str, Any], leaves: Mapping[str, _Leaf], *, place: str) -> dict[str, Any]:
    """Open the sections of a YAML mapping -> {leaf: its text, None, list or mapping}, in its order."""
    sections = {section for leaf in leaves.values() for section in leaf.path[:-1]}
    values: dict[str, Any] = {}
    for section, key, value in _settings(content, sections, leaves, place):
        if key not in leaves:
            known = (
                [*leaves, *sections] if section is None else [k for k, leaf in leaves.items() if section in leaf.path]
            )
            where = f" in section {section}" if section else ""
            raise ConfigError(f"{place}: unknown key {key!r}{where}. {_nearest(key, known)}Remove or rename it.")
        leaf = leaves[key]
        if section is not None and section not in leaf.path:
            home = leaf.path[-2] if len(leaf.path) > 1 else "no section"
            raise ConfigError(f"{place}: {key!r} stands in section {section}, but belongs to {home}. Move it there.")
        if key in values:
            raise ConfigError(f"{place}: {key!r} is given twice, in a section and outside it. Keep one.")
        values[key] = value
    return values


def _from_values(
    config_class: type[ConfigT], values: Mapping[str, Any], leaves: Mapping[str, _Leaf], *, place: str
) -> ConfigT:
    _check_required(leaves, given=set(values), within=f", in {place}")
    tokens = [t for key, value in values.items() for t in _tokens_of_value(key, leaves[key], value, place=f"{place}: ")]
    for key in (key for key, leaf in leaves.items() if leaf.is_settings and key not in values):
        tokens.append(flag_of(key))
    return _construct(config_class, "", "", tokens, [], place)


def _merged(flag: str, before: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Gather all values of a flag behind those of the file -> tokens that have the flag once."""
    values, rest, is_value = list(before), [], False
    for token in tokens:
        name, equals, value = token.partition("=")
        if name == flag:
            values += [value] if equals else []
            is_value = not equals
        elif token.startswith("--"):
            rest.append(token)
            is_value = False
        else:
            (values if is_value else rest).append(token)
    return [*rest, flag, *values]


def _settings(
    content: Mapping[str, Any], sections: set[str], leaves: Mapping[str, _Leaf], place: str
) -> Iterator[tuple[str | None, str, Any]]:
    """Walk a YAML mapping -> (innermost section or None, key, value) triples."""
    for name, value in content.items():
        # A section may hold a setting of its own name, as in `objective: {objective: sppo}`.
        if name not in sections or (name in leaves and not isinstance(value, dict)):
            yield None, str(name), value
        elif isinstance(value, dict):
            for inner_section, key, inner in _settings(value, sections, leaves, place):
                yield inner_section or name, key, inner
        elif value is not None:
            raise ConfigError(
                f"{place}: {name} is a section and holds `key: value` lines, not {value!r}. Indent them below it."
            )


def _tokens_of_value(key: str, leaf: _Leaf, value: Any, *, place: str) -> list[str]:
    """Spell one value (text, None, list or mapping of texts) as the tokens that a user would type."""
    flag = flag_of(key)
    if isinstance(value, dict) and leaf.is_settings:
        return [flag, json.dumps(value)]
    if isinstance(value, dict):
        if not leaf.takes_many:
            raise ConfigError(f"{place}{key!r} takes one value, not a mapping. Write `{key}: VALUE`.")
        value = [f"{name}={_flow(item)}" for name, item in value.items()]
    if isinstance(value, list):
        if not leaf.takes_many or any(isinstance(item, (list, dict)) for item in value):
            raise ConfigError(
                f"{place}{key!r} cannot take {value}. Write `{key}: {'[A, B]' if leaf.takes_many else 'VALUE'}`."
            )
        return [flag, *("None" if item is None else item for item in value)]
    if value is None:
        if leaf.takes(type(None)):
            return [f"{flag}=None"]
        raise ConfigError(
            f"{place}{key!r} is empty, but needs a value. Write `{key}: VALUE` or remove the line for the default."
        )
    if leaf.takes(bool) and value.lower() in (*_TRUE, *_FALSE):
        true = value.lower() in _TRUE
        return [(flag if true else flag_of("no_" + key)) if leaf.is_switch else f"{flag}={true}"]
    if leaf.is_switch:
        raise ConfigError(f"{place}{key!r} is {value!r}; it must be true or false.")
    return [flag, value] if leaf.takes_many else [f"{flag}={value}"]


def _flow(value: Any) -> str:
    """Spell a mapping's value as YAML's flow style has it, null and numbers within lists as they stood -> text."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_flow(item)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return "null" if value is None else str(value)


def _construct(
    config_class: type[ConfigT], name: str, description: str, from_file: list[str], typed: list[str], file: str
) -> ConfigT:
    """Let tyro read the tokens -> an instance; its boxed messages become one ConfigError line."""
    extended = dataclasses.make_dataclass(
        config_class.__name__,
        [
            ("config", Annotated[Path | None, tyro.conf.arg(help="YAML file with settings; flags win over it.")], None),
            ("debug", Annotated[bool, tyro.conf.arg(help="Show tracebacks."), tyro.conf.FlagCreatePairsOff], False),
        ],
        bases=(config_class,),
        frozen=True,
        kw_only=True,
    )
    console = io.StringIO()
    width = contextlib.nullcontext() if typed == ["--help"] else _wide_console()
    try:
        with contextlib.redirect_stderr(console), width:
            parsed: Any = tyro.cli(
                extended,
                prog=name,
                description=description,
                args=[*from_file, *typed],
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        _raise_config_error(exit_, console.getvalue(), {t.partition("=")[0] for t in from_file} - set(typed), file)
    return config_class(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(config_class)})  # type: ignore[arg-type]


def _raise_config_error(exit_: SystemExit, boxed: str, flags_of_file: set[str], file: str) -> NoReturn:
    """Say in one line why tyro refused; a section's own ConfigError, which tyro wraps, comes out as it was."""
    cause = exit_.__context__
    while cause is not None:
        if isinstance(cause, ConfigError):
            raise cause from None
        cause = cause.__context__
    message = " ".join(_boxed_text(boxed)).rstrip(".")
    message = re.sub(r"typing\.Annotated\[(\w+), [^\]]*\]", r"\1", message)
    origin = f"{file}: " if any(flag in message for flag in flags_of_file) else ""
    raise ConfigError(f"{origin}{message}. Run with --help for what each flag takes.") from None


def _boxed_text(boxed: str) -> Iterator[str]:
    """Take a message out of tyro's frame, up to the first rule (below it stands the flag's help) -> its lines."""
    said = False
    for line in boxed.splitlines()[1:]:
        text = line.strip("\u2502|+\u2570\u256f ")
        is_rule = not text.strip("\u2500-")
        if text and is_rule and said:
            return
        if not is_rule:
            said = True
            yield text


@contextlib.contextmanager
def _wide_console() -> Iterator[None]:
    """Keep tyro from wrapping a message inside its frame, which could cut a path in two."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _summary(config_class: type[Any]) -> str:
    return (config_class.__doc__ or "").strip().partition("\n")[0]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _plain_text(value: Any) -> Any:
    """Spell a value as YAML text would arrive: None, a text, or a list or mapping of such."""
    if isinstance(value, Mapping):
        return {name: _plain_text(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain_text(item) for item in value]
    return None if value is None else spell(value)


def spell(value: Any) -> str:
    """Spell a setting's value as people type it -> text that reads back as the same: 5e-7, not 5e-07."""
    return re.sub(r"e([+-])0(\d)$", r"e\1\2", str(value)) if isinstance(value, float) else str(value)


def _keys(tokens: Sequence[str]) -> set[str]:
    return {_snake(token.partition("=")[0]) for token in tokens if token.startswith("--")}


def _all_flags(leaves: Mapping[str, _Leaf]) -> list[str]:
    flags = [flag_of(key) for key in (*leaves, *_BUILT_IN)]
    return flags + [flag_of("no_" + key) for key, leaf in leaves.items() if leaf.is_switch]


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}? " if close else ""


def flag_of(name: str) -> str:
    """Spell a setting's name as the user types it: global_batch_size -> "--global-batch-size"."""
    return "--" + name.replace("_", "-")


def _snake(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
