"""Dataclasses <-> command line <-> YAML, in one place.

A config is a frozen dataclass whose fields may be dataclasses ("sections"). Every leaf is one flat flag in Megatron's
kebab-case. `--config FILE.yaml` holds the same names in snake_case, grouped by section or flat. A YAML value becomes
the tokens that a user would have typed, put before the user's own: one path validates both, and the later one wins.
A number's annotation says what it may be (`PositiveInt`, `Annotated[float, Range(0, 1)]`), and `check_ranges` holds it.
`Annotated[PositiveInt, LAYOUT]` marks what a resumed run may change; `deciding` lists what it may not. A field marked
`SettingsOf` holds the config of another command, which one flag takes as NAME=VALUE. Fields and their marks are in
`config_fields`, texts on their way to them in `config_text`; what configs are written with can be had from here.
"""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import logging
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml

from megatron_sppo.config_fields import (
    DECIDES,
    LAYOUT,
    POSITIONAL,
    TUNABLE,
    Fraction,
    HoldsSettings,
    Leaf,
    Mark,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    check_given,
    check_ranges,
    chosen,
    flag_of,
    leaves_of,
    name_of,
    spell,
    value_of,
)
from megatron_sppo.config_refusals import raise_config_error, wide_console
from megatron_sppo.config_text import (
    TextLoader,
    check_flags,
    check_required,
    config_file,
    keys_of,
    leaf_values,
    merged,
    nearest,
    plain_text,
    read_yaml,
    tokens_of_value,
    with_flags,
)
from megatron_sppo.errors import ConfigError
from megatron_sppo.storage import atomic_file

__all__ = [
    "DECIDES",
    "LAYOUT",
    "POSITIONAL",
    "TUNABLE",
    "Fraction",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Range",
    "Seed",
    "SettingsOf",
    "check_ranges",
    "config_file",
    "deciding",
    "flag_of",
    "from_dict",
    "is_written_of",
    "parse",
    "parse_command",
    "spell",
    "take_command",
    "to_dict",
    "to_flags",
    "write_yaml",
]

ConfigT = TypeVar("ConfigT")
logger = logging.getLogger(__name__)


class SettingsOf(tyro.constructors.PrimitiveConstructorSpec[Any], HoldsSettings):
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
        leaves, place = leaves_of(self.config_class), f"section {self.name}"
        open_leaves = {name: leaf for name, leaf in leaves.items() if name not in self.decided}
        values, given = dict[str, Any](), set[str]()
        for text in texts:
            values |= (found := leaf_values(self._content(text), leaves, place=place))
            given |= chosen(set(found) - set(self.decided), open_leaves)
        if own := [name for name in values if name in self.decided]:
            raise ConfigError(f"{self.name} sets {own[0]}, which {self.by} decides itself. Remove it.")
        config = _from_values(self.config_class, {**plain_text(self.decided), **values}, leaves, place=place)
        check_given(config, given, leaves)
        return config

    def _content(self, text: str) -> dict[str, Any]:
        """Read NAME=VALUE or a JSON object -> {name: text, None, list or dict}, as YAML would hold it."""
        name, equals, value = text.partition("=")
        try:
            if text.startswith("{"):
                return dict(plain_text(json.loads(text)))
            is_flow = value.startswith(("[", "{"))
            flow = yaml.load(value, Loader=TextLoader) if is_flow else value  # noqa: S506 (texts alone)
        except (ValueError, yaml.YAMLError):
            raise ConfigError(f"{self.name} holds {text!r}, which is not YAML. Quote the value.") from None
        if not equals:
            raise ConfigError(
                f"{self.name} holds {text!r}. Write NAME=VALUE, or in YAML `{self.name}: {{NAME: VALUE}}`."
            )
        return {name_of(name): None if flow == "None" else flow}


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
    leaves = leaves_of(config_class)
    if not {"-h", "--help"} & set(tokens):
        tokens = check_flags(with_flags(tokens, leaves), leaves)
        file = config_file(tokens)
        content = {} if file is None else read_yaml(file)
        values = leaf_values(content if of_file is None else of_file(content), leaves, place=str(file))
        from_file = {key: tokens_of_value(key, leaves[key], value, place=f"{file}: ") for key, value in values.items()}
        check_required(leaves, given=set(from_file) | keys_of(tokens))
        given = chosen(values, leaves) | keys_of(tokens)
        for key in (key for key, leaf in leaves.items() if leaf.is_settings):
            tokens = merged(flag_of(key), from_file.pop(key, [])[1:], tokens)
        _say_what_is_replaced(tokens, from_file, file)
        tokens_of_file = [token for group in from_file.values() for token in group]
        config = _construct(config_class, name, description, tokens_of_file, tokens, str(file))
        check_given(config, given, leaves)
        return config
    return _construct(config_class, name, description, [], ["--help"], "")


def from_dict(config_class: type[ConfigT], content: Mapping[str, Any], *, place: str) -> ConfigT:
    """Build a config from what `to_dict` made of one, JSON and back included, as `parse` does from a YAML file.

    Raises:
        ConfigError: as `parse`; `place` names where the content stands.
    """
    leaves = leaves_of(config_class)
    return _from_values(config_class, leaf_values(plain_text(content), leaves, place=place), leaves, place=place)


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
        near = nearest(tokens[0], list(summaries)) if tokens else ""
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
    for leaf in leaves_of(type(config)).values():
        path, value = ".".join(leaf.path), value_of(config, leaf)
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
        return list(read_yaml(path)) == list(to_dict(config))
    except ConfigError:
        return False


def to_flags(config: Any) -> list[str]:
    """Spell a config as command-line tokens, for a child process that takes the same flags -> list of tokens.

    Values that equal the default are left out; what the child lacks is its own ConfigError.
    """
    flags: list[str] = []
    for key, leaf in leaves_of(type(config)).items():
        value = value_of(config, leaf)
        if leaf.required or value != leaf.default:
            flags += tokens_of_value(key, leaf, plain_text(value), place="")
    return flags


def _from_values(
    config_class: type[ConfigT], values: Mapping[str, Any], leaves: Mapping[str, Leaf], *, place: str
) -> ConfigT:
    check_required(leaves, given=set(values), within=f", in {place}")
    tokens = [t for key, value in values.items() for t in tokens_of_value(key, leaves[key], value, place=f"{place}: ")]
    for key in (key for key, leaf in leaves.items() if leaf.is_settings and key not in values):
        tokens.append(flag_of(key))
    return _construct(config_class, "", "", tokens, [], place)


def _construct(
    config_class: type[ConfigT], name: str, description: str, from_file: list[str], typed: list[str], file: str
) -> ConfigT:
    """Let tyro read the tokens -> an instance; its boxed messages become one ConfigError line."""
    wants_help = typed == ["--help"]
    extended = dataclasses.make_dataclass(
        config_class.__name__,
        [
            ("config", Annotated[Path | None, tyro.conf.arg(help="YAML file with settings; flags win over it.")], None),
            ("debug", Annotated[bool, tyro.conf.arg(help="Show tracebacks."), tyro.conf.FlagCreatePairsOff], False),
            *([] if wants_help else _without_help(config_class)),
        ],
        bases=(config_class,),
        frozen=True,
        kw_only=True,
    )
    console = io.StringIO()
    width = contextlib.nullcontext() if wants_help else wide_console()
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
        raise_config_error(exit_, console.getvalue(), {t.partition("=")[0] for t in from_file} - set(typed), file)
    return config_class(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(config_class)})  # type: ignore[arg-type]


def _without_help(config_class: type[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Define a class's sections again, with nothing to say: tyro (1.0) reads their sources for it, --help or not."""
    plain, marked = (typing.get_type_hints(config_class, include_extras=extras) for extras in (False, True))
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(plain[field.name]):
            annotation: Any = Annotated[marked[field.name], tyro.conf.arg(help="")]
            yield field.name, annotation, copy.copy(field)


def _summary(config_class: type[Any]) -> str:
    return (config_class.__doc__ or "").strip().partition("\n")[0]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
