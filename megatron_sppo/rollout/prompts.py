"""Prompt files -> chat messages. Rows that cannot be used are set aside with their reason, never silently dropped.

Read: JSON Lines, a JSON list, Parquet, and directories (`datasets.save_to_disk`, or a dataset snapshot with Parquet or
JSON Lines files). A row has `prompt` (a string, or TRL's list of chat messages) or `messages`; `prompt_id` and `split`
are optional; other columns (uclaml's and TRL's responses) are ignored. `prompt` wins over `messages`, because
preference sets hold the answered conversation in the latter.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.storage import sha256_of_json

NO_ROW = object()
"""Stands for a row that cannot be read."""
_PROMPT_COLUMNS = frozenset({"prompt", "messages", "prompt_id", "split"})
_WHOLE_FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One conversation that awaits an answer."""

    prompt_id: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The prompts of one file and the rows that were set aside."""

    prompts: tuple[Prompt, ...]
    quarantined: tuple[dict[str, str], ...]
    """Each {"prompt_id", "reason"}; a row without an id is called "row-<number from 1>"."""


class UnusableRow(Exception):
    """Why one row is set aside, as a clause."""


def read_prompts(path: Path, *, split: str | None = None, offset: int = 0, limit: int | None = None) -> PromptSet:
    """Read a prompt file or directory -> PromptSet, in file order.

    Args:
        split: keep the rows whose `split` is this (in directories: the dataset's split).
        offset: good prompts to skip, after the split was chosen.
        limit: most prompts to keep; None keeps all.

    Raises:
        ConfigError: the split does not exist, or must be chosen; a negative offset or a limit below 1.
        DataError: no such file, an unknown kind of file, or not one usable prompt.
    """
    path = Path(path)
    if offset < 0 or (limit is not None and limit < 1):
        raise ConfigError(f"offset is {offset} and limit {limit}. Use --offset 0 or more and --limit 1 or more.")
    good: list[Prompt] = []
    quarantined: list[dict[str, str]] = []
    first_row_of_id: dict[str, int] = {}
    id_of_content: dict[str, str] = {}
    splits: set[str | None] = set()
    for number, (row, fault) in enumerate(table_rows(path, split, columns=_PROMPT_COLUMNS), start=1):
        row_split = row.get("split") if isinstance(row, dict) else None
        splits.add(row_split if isinstance(row_split, str) else None)
        wanted = split is None or row_split == split or row is NO_ROW
        try:
            if fault is not None:
                raise UnusableRow(fault)
            prompt = prompt_of_row(row)
            # Across splits too: a held-out prompt that is also trained on measures nothing.
            _refuse_duplicate(prompt, number, first_row_of_id, id_of_content)
        except UnusableRow as reason:
            if wanted:
                quarantined.append({"prompt_id": _name_of(row, number), "reason": str(reason)})
            continue
        if wanted:
            good.append(prompt)
            if limit is not None and len(good) == offset + limit:
                break
    _check_split(path, split, splits)
    if not good:
        first = f"; the first: {quarantined[0]['prompt_id']}: {quarantined[0]['reason']}" if quarantined else ""
        raise DataError(
            f"{path} has no usable prompt ({len(quarantined)} rows set aside{first}). "
            'Give rows such as {"prompt": "Why is the sky blue?"}.'
        )
    if offset >= len(good):
        raise ConfigError(f"--offset {offset} skips all {len(good)} prompts of {path}. Use a smaller --offset.")
    return PromptSet(prompts=tuple(good[offset:]), quarantined=tuple(quarantined))


def prompts_hash(prompts: tuple[Prompt, ...]) -> str:
    """Hash ids and texts in order -> 64 hex digits."""
    return sha256_of_json([[prompt.prompt_id, prompt.messages] for prompt in prompts])


def prompt_of_row(row: Any) -> Prompt:
    """Read one row -> Prompt.

    Raises:
        UnusableRow: it has no prompt that could be answered.
    """
    if not isinstance(row, dict):
        raise UnusableRow(f"the row is a {type(row).__name__}, not an object")
    content = row.get("prompt") if row.get("prompt") is not None else row.get("messages")
    if content is None:
        raise UnusableRow("the row has neither prompt nor messages")
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if not isinstance(content, (list, tuple)) or not content:
        raise UnusableRow("prompt or messages is neither a text nor a non-empty list of messages")
    messages = tuple(_message(turn) for turn in content)
    if messages[-1]["role"] == "assistant":
        raise UnusableRow("the last message is the assistant's: nothing is left to answer")
    if not messages[-1]["content"].strip():
        raise UnusableRow("the prompt has no text")
    given = row.get("prompt_id")
    if given is None or given == "":
        return Prompt(prompt_id=_content_hash(messages)[:16], messages=messages)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise UnusableRow("prompt_id is neither a string nor an integer")
    prompt_id = str(given)
    _refuse_bad_text(prompt_id, "prompt_id")
    return Prompt(prompt_id=prompt_id, messages=messages)


def _message(turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise UnusableRow("a message is no object with role and content")
    role, text = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not role:
        raise UnusableRow("a message has no role")
    if not isinstance(text, str):
        raise UnusableRow(f"the {role} message's content is no text")
    _refuse_bad_text(role, "role")
    _refuse_bad_text(text, f"{role} message")
    return {"role": role, "content": text}


def _refuse_bad_text(text: str, place: str) -> None:
    if "\0" in text:
        raise UnusableRow(f"the {place} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow(f"the {place} holds half a surrogate pair at character {error.start}") from None


def _refuse_duplicate(
    prompt: Prompt, number: int, first_row_of_id: dict[str, int], id_of_content: dict[str, str]
) -> None:
    content = _content_hash(prompt.messages)
    if content in id_of_content:
        raise UnusableRow(f"the same text as prompt {id_of_content[content]}")
    if prompt.prompt_id in first_row_of_id:
        raise UnusableRow(f"the same prompt_id as row {first_row_of_id[prompt.prompt_id]}")
    first_row_of_id[prompt.prompt_id] = number
    id_of_content[content] = prompt.prompt_id


def _content_hash(messages: tuple[dict[str, str], ...]) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def _name_of(row: Any, number: int) -> str:
    given = row.get("prompt_id") if isinstance(row, dict) else None
    if isinstance(given, str) and given and given.isprintable():
        return given
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else f"row-{number}"


def _check_split(path: Path, split: str | None, found: set[str | None]) -> None:
    if split is None or split in found:
        return
    named = sorted(name for name in found if name is not None)
    if not named:
        raise ConfigError(f"no row of {path} carries `split`. Leave out --split.")
    raise ConfigError(f"{path} has no rows of split {split!r}. Use --split with one of: {', '.join(named)}.")


def table_rows(
    path: Path, split: str | None, *, columns: frozenset[str] | None = None
) -> Iterator[tuple[Any, str | None]]:
    """Read any kind of file or directory -> (row, None), or (NO_ROW, reason) where a line cannot be read.

    Args:
        columns: all that is wanted of a Parquet file; None: every column.
    """
    if path.is_dir():
        return _directory_rows(path, split, columns)
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give a .jsonl, .json or .parquet file or a dataset directory.")
    if path.suffix == ".parquet":
        return ((row, None) for row in _parquet_rows(path, columns))
    if path.suffix in _WHOLE_FILE_SUFFIXES:
        return _json_rows(path)
    raise DataError(f"{path}: files that end in {path.suffix!r} are not read. Give .jsonl, .json or .parquet.")


def _json_rows(path: Path) -> Iterator[tuple[Any, str | None]]:
    """Read a JSON list or JSON Lines, told apart by the first character, whatever the suffix says."""
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
            file.seek(0)
            if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                yield from _json_list(path, file.read())
                return
            for line in file:
                if line.strip():
                    yield _json_line(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Give a readable file.") from None


def _json_list(path: Path, content: bytes) -> Iterator[tuple[Any, str | None]]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}). Mend it, or write one row a line (.jsonl).") from None
    return iter([(row, None) for row in rows])


def _json_line(line: bytes) -> tuple[Any, str | None]:
    try:
        return json.loads(line.decode("utf-8-sig")), None
    except UnicodeDecodeError as error:
        return NO_ROW, f"the line is not UTF-8 (byte {error.start})"
    except (ValueError, RecursionError):
        return NO_ROW, "the line is not valid JSON"


def _parquet_rows(path: Path, wanted: frozenset[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = set(file.schema_arrow.names) & (wanted or set(file.schema_arrow.names))
        if wanted is not None and not columns & {"prompt", "messages"}:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path} has no column prompt or messages (it has: {names}). Rename the column.")
        for batch in file.iter_batches(columns=sorted(columns)):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is no readable Parquet file ({reason}). Download or write it again.") from None


def _directory_rows(path: Path, split: str | None, columns: frozenset[str] | None) -> Iterator[tuple[Any, str | None]]:
    """Read a dataset directory. Several splits must be told apart: mixing test rows in would go unnoticed."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_dataset_rows(path, split)
    files = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl") and file.is_file())
    if not files:
        raise DataError(f"{path} holds no dataset: no state.json, *.parquet or *.jsonl. Check the path.")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.stem.partition("-")[0], []).append(file)  # train-00000-of-00003.parquet
    if len(by_split) == 1 and split not in by_split:  # the files are not named by split: rows may carry it themselves
        return itertools.chain.from_iterable(table_rows(file, None, columns=columns) for file in files)
    chosen = _choose_split(path, split, list(by_split))
    rows = itertools.chain.from_iterable(table_rows(file, None, columns=columns) for file in by_split[chosen])
    return ((_with_split(row, chosen), fault) for row, fault in rows)


def _saved_dataset_rows(path: Path, split: str | None) -> Iterator[tuple[Any, str | None]]:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is no readable dataset ({reason}). Save it again with save_to_disk.") from None
    if isinstance(loaded, datasets.DatasetDict):
        chosen = _choose_split(path, split, list(loaded))
        return ((_with_split(row, chosen), None) for row in loaded[chosen])
    return ((row, None) for row in loaded)


def _choose_split(path: Path, split: str | None, names: list[str]) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return str(split)
    fact = "several splits" if split is None else f"no split {split!r}"
    raise ConfigError(f"{path} has {fact}. Use --split with one of: {', '.join(sorted(names))}.")


def _with_split(row: Any, split: str) -> Any:
    return {**row, "split": split} if isinstance(row, dict) else row
