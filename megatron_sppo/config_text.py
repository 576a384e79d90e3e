"""Settings as texts: the tokens of a command line, and YAML's values as the tokens that a user would have typed."""

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sppo.config_fields import BUILT_IN, POSITIONAL, Leaf, flag_of, name_of, spell
from megatron_sppo.errors import ConfigError
from megatron_sppo.storage import own_or_packaged, packaged_examples

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def with_flags(tokens: list[str], leaves: Mapping[str, Leaf]) -> list[str]:
    """Put the flags of positional settings before what is typed without them, wherever it stands -> tokens."""
    typed = {name_of(token.partition("=")[0]) for token in tokens}
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


def _num_values(token: str, leaves: Mapping[str, Leaf]) -> float:
    """Count the tokens behind a flag that are its values, at most -> 0, 1, or infinity."""
    leaf, switch = leaves.get(name_of(token)), leaves.get(name_of(token).removeprefix("no_"))
    if "=" in token or token in ("--debug", "--help", "-h") or (switch is not None and switch.is_switch):
        return 0
    return math.inf if leaf is not None and leaf.takes_many else 1


def check_flags(tokens: list[str], leaves: Mapping[str, Leaf]) -> list[str]:
    """Refuse flags that do not exist, naming the nearest one that does -> the tokens, in kebab-case."""
    checked = []
    for token in tokens:
        if not token.startswith("--") or token == "--":
            checked.append(token)
            continue
        flag, equals, value = token.partition("=")
        key = name_of(flag)
        switch = key.removeprefix("no_") if key not in leaves else key
        known = key in leaves or key in BUILT_IN or (switch in leaves and leaves[switch].is_switch)
        if not known:
            raise ConfigError(f"unknown flag {flag}. {nearest(flag, _all_flags(leaves))}Run with --help for the list.")
        if equals and (key == "debug" or (switch in leaves and leaves[switch].is_switch)):
            raise ConfigError(f"{token}: {flag} takes no value. Use {flag_of(switch)} or {flag_of('no_' + switch)}.")
        checked.append(flag_of(key) + equals + value)
    return checked


def check_required(leaves: Mapping[str, Leaf], *, given: set[str], within: str = "") -> None:
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


class TextLoader(yaml.BaseLoader):
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


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML mapping of texts -> dict; empty file, empty dict."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=TextLoader)  # noqa: S506 (texts alone)
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


def leaf_values(content: Mapping[str, Any], leaves: Mapping[str, Leaf], *, place: str) -> dict[str, Any]:
    """Open the sections of a YAML mapping -> {leaf: its text, None, list or mapping}, in its order."""
    sections = {section for leaf in leaves.values() for section in leaf.path[:-1]}
    values: dict[str, Any] = {}
    for section, key, value in _settings(content, sections, leaves, place):
        if key not in leaves:
            known = (
                [*leaves, *sections] if section is None else [k for k, leaf in leaves.items() if section in leaf.path]
            )
            where = f" in section {section}" if section else ""
            raise ConfigError(f"{place}: unknown key {key!r}{where}. {nearest(key, known)}Remove or rename it.")
        leaf = leaves[key]
        if section is not None and section not in leaf.path:
            home = leaf.path[-2] if len(leaf.path) > 1 else "no section"
            raise ConfigError(f"{place}: {key!r} stands in section {section}, but belongs to {home}. Move it there.")
        if key in values:
            raise ConfigError(f"{place}: {key!r} is given twice, in a section and outside it. Keep one.")
        values[key] = value
    return values


def _settings(
    content: Mapping[str, Any], sections: set[str], leaves: Mapping[str, Leaf], place: str
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


def merged(flag: str, before: Sequence[str], tokens: Sequence[str]) -> list[str]:
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


def tokens_of_value(key: str, leaf: Leaf, value: Any, *, place: str) -> list[str]:
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


def plain_text(value: Any) -> Any:
    """Spell a value as YAML text would arrive: None, a text, or a list or mapping of such."""
    if isinstance(value, Mapping):
        return {name: plain_text(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_text(item) for item in value]
    return None if value is None else spell(value)


def keys_of(tokens: Sequence[str]) -> set[str]:
    return {name_of(token.partition("=")[0]) for token in tokens if token.startswith("--")}


def _all_flags(leaves: Mapping[str, Leaf]) -> list[str]:
    flags = [flag_of(key) for key in (*leaves, *BUILT_IN)]
    return flags + [flag_of("no_" + key) for key, leaf in leaves.items() if leaf.is_switch]


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}? " if close else ""
