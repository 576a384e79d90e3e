"""Prompt files -> chat messages. Rows that cannot be used are set aside with their reason, never silently dropped.

`tables` reads the files, `conversations` the columns; `prompt_id` and `split` are optional, other columns are ignored.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.conversations import (
    CONTEXT_COLUMNS,
    PROMPT_COLUMNS,
    prompt_messages,
    refuse_bad_text,
)
from megatron_sppo.rollout.records import SetAside, Turn
from megatron_sppo.rollout.tables import SplitRows, UnusableRow
from megatron_sppo.storage import sha256_of_json


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One conversation that awaits an answer."""

    prompt_id: str
    messages: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The prompts of one file and the rows that were set aside."""

    prompts: tuple[Prompt, ...]
    quarantined: tuple[SetAside, ...]
    """A row without an id is called "row-<number from 1>"."""
    splits: tuple[str, ...] = ()
    """Those that the rows name, of all rows that were read."""


def read_prompts(
    path: Path, *, split: str | None = None, subset: str | None = None, offset: int = 0, limit: int | None = None
) -> PromptSet:
    """Read a prompt file or directory -> PromptSet, in file order.

    Args:
        split: keep the rows whose `split` is this (in directories: the dataset's split).
        subset: the one to read of a directory that holds several.
        offset: good prompts to skip, after the split was chosen.
        limit: most prompts to keep; None keeps all.

    Raises:
        ConfigError: the split or subset does not exist, or must be chosen; a negative offset or a limit below 1.
        DataError: no such file, an unknown kind of file, or not one usable prompt.
    """
    path = Path(path)
    if offset < 0 or (limit is not None and limit < 1):
        raise ConfigError(f"offset is {offset} and limit {limit}. Use --offset 0 or more and --limit 1 or more.")
    good: list[Prompt] = []
    quarantined: list[SetAside] = []
    first_row_of_id: dict[str, int] = {}
    id_of_content: dict[str, str] = {}
    rows = SplitRows(path, split, subset=subset, columns=PROMPT_COLUMNS, context=CONTEXT_COLUMNS)
    for number, row, wanted in rows:
        try:
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
    if not good:
        first = f"; the first: {quarantined[0]['prompt_id']}: {quarantined[0]['reason']}" if quarantined else ""
        raise DataError(
            f"{path} has no usable prompt ({len(quarantined)} rows set aside{first}). "
            'Give rows such as {"prompt": "Why is the sky blue?"}.'
        )
    if offset >= len(good):
        raise ConfigError(f"--offset {offset} skips all {len(good)} prompts of {path}. Use a smaller --offset.")
    return PromptSet(prompts=tuple(good[offset:]), quarantined=tuple(quarantined), splits=tuple(sorted(rows.splits)))


def prompts_hash(prompts: tuple[Prompt, ...]) -> str:
    """Hash ids and texts in order -> 64 hex digits."""
    return sha256_of_json([[prompt.prompt_id, prompt.messages] for prompt in prompts])


def prompt_of_row(row: Any) -> Prompt:
    """Read one row -> Prompt.

    Raises:
        UnusableRow: it has no prompt that could be answered.
    """
    if isinstance(row, UnusableRow):
        raise row
    if not isinstance(row, dict):
        raise UnusableRow(f"the row is a {type(row).__name__}, not an object")
    return make_prompt(prompt_messages(row), row.get("prompt_id"))


def make_prompt(messages: Sequence[Turn], given: Any) -> Prompt:
    """Give messages the id that their row names, or the hash of their content -> Prompt."""
    turns = tuple(messages)
    if given is None or given == "":
        return Prompt(prompt_id=_content_hash(turns)[:16], messages=turns)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise UnusableRow("prompt_id is neither a string nor an integer")
    prompt_id = str(given)
    refuse_bad_text(prompt_id, "prompt_id")
    return Prompt(prompt_id=prompt_id, messages=turns)


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


def _content_hash(messages: tuple[Turn, ...]) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def _name_of(row: Any, number: int) -> str:
    given = row.get("prompt_id") if isinstance(row, dict) else None
    if isinstance(given, str) and given and given.isprintable():
        return given
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else f"row-{number}"
