"""Prompt files -> chat messages. Rows that cannot be used are set aside with their reason, never silently dropped.

`tables` reads the files, `conversations` the columns; `prompt_id` and `split` are optional. What judges check answers
against travels with the prompt, other columns are ignored.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.conversations import (
    CHECKED_COLUMNS,
    CONTEXT_COLUMNS,
    PROMPT_COLUMNS,
    QUESTIONED_COLUMNS,
    kept_columns,
    prompt_messages,
    refuse_bad_text,
)
from megatron_sppo.rollout.records import SetAside, Turn
from megatron_sppo.rollout.table_files import UnusableRow
from megatron_sppo.rollout.tables import SplitRows


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One conversation that awaits an answer."""

    prompt_id: str
    messages: tuple[Turn, ...]
    columns: dict[str, Any] | None = None
    """What judges check answers against, by the columns of the prompt's row; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The prompts of one file and the rows that were set aside."""

    prompts: tuple[Prompt, ...]
    quarantined: tuple[SetAside, ...]
    """A row without an id is called "row-<number from 1>"."""
    splits: tuple[str, ...] = ()
    """Those that the rows name, of all rows that were read."""


class PromptRows:
    """The usable prompts of a file or directory, in file order, read as they are asked for and not kept."""

    def __init__(
        self,
        path: Path,
        *,
        split: str | None = None,
        subset: str | None = None,
        offset: int = 0,
        limit: int | None = None,
        keep_columns: Collection[str] = (),
    ) -> None:
        """Open the file or directory.

        Args:
            split: keep the rows whose `split` is this (in directories: the dataset's split).
            subset: the one to read of a directory that holds several.
            offset: good prompts to skip, after the split was chosen.
            limit: most prompts to keep; None keeps all.
            keep_columns: columns that travel with the prompts, beside CHECKED_COLUMNS.

        Raises:
            ConfigError: the split or subset does not exist, or must be chosen; a negative offset or a limit below 1.
            DataError: no such file.
        """
        if offset < 0 or (limit is not None and limit < 1):
            raise ConfigError(f"offset is {offset} and limit {limit}. Use --offset 0 or more and --limit 1 or more.")
        self.path, self._offset, self._limit = Path(path), offset, limit
        if taken := (PROMPT_COLUMNS | CONTEXT_COLUMNS).intersection(keep_columns):
            raise ConfigError(
                f"keep_columns names {min(taken)}, a part of the prompt, which reaches judges as messages. "
                "Leave it out."
            )
        self._kept = CHECKED_COLUMNS | set(keep_columns)
        context = CONTEXT_COLUMNS | QUESTIONED_COLUMNS | self._kept
        self._rows = SplitRows(self.path, split, subset=subset, columns=PROMPT_COLUMNS, context=context)
        self.quarantined: list[SetAside] = []
        """Of the rows that were read so far. A row without an id is called "row-<number from 1>"."""

    @property
    def splits(self) -> set[str]:
        """Those that the rows which were read so far name."""
        return self._rows.splits

    def __iter__(self) -> Iterator[Prompt]:
        """Read the prompts, once.

        Raises:
            ConfigError: no row is of the split; the offset skips all prompts.
            DataError: an unknown kind of file, an unreadable one, or not one usable prompt.
        """
        seen, num_good = _Seen(), 0
        for number, row, wanted in self._rows:
            try:
                prompt = prompt_of_row(row, keep=self._kept)
                # Across splits too: a held-out prompt that is also trained on measures nothing.
                seen.refuse_duplicate(prompt, number)
            except UnusableRow as reason:
                if wanted:
                    self.quarantined.append({"prompt_id": _name_of(row, number), "reason": str(reason)})
                continue
            if wanted:
                num_good += 1
                if num_good > self._offset:
                    yield prompt
                if self._limit is not None and num_good == self._offset + self._limit:
                    break
        if not num_good:
            left_out = self.quarantined
            first = f"; the first: {left_out[0]['prompt_id']}: {left_out[0]['reason']}" if left_out else ""
            raise DataError(
                f"{self.path} has no usable prompt ({len(left_out)} rows set aside{first}). "
                'Give rows such as {"prompt": "Why is the sky blue?"}.'
            )
        if self._offset >= num_good:
            raise ConfigError(
                f"--offset {self._offset} skips all {num_good} prompts of {self.path}. Use a smaller --offset."
            )


def read_prompts(path: Path, **chosen: Any) -> PromptSet:
    """Read a prompt file or directory whole -> PromptSet, in file order. Arguments and errors are `PromptRows`'s."""
    rows = PromptRows(path, **chosen)
    prompts = tuple(rows)
    return PromptSet(prompts=prompts, quarantined=tuple(rows.quarantined), splits=tuple(sorted(rows.splits)))


class PromptsHash:
    """The hash of prompts in their order, taken one by one: that of a JSON list of [id, messages] or, where a prompt
    has columns that answers are checked against, [id, messages, columns]."""

    def __init__(self) -> None:
        self._digest, self._between = hashlib.sha256(b"["), b""

    def add(self, prompt: Prompt) -> None:
        """Take the next prompt."""
        parts = [prompt.prompt_id, prompt.messages, *([prompt.columns] if prompt.columns else [])]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        self._digest.update(self._between + text.encode())
        self._between = b","

    def hexdigest(self) -> str:
        """Hash those that were taken -> 64 hex digits."""
        digest = self._digest.copy()
        digest.update(b"]")
        return digest.hexdigest()


def prompt_of_row(row: Any, *, keep: Collection[str] = CHECKED_COLUMNS) -> Prompt:
    """Read one row -> Prompt, with those of the columns in `keep` that it has.

    Raises:
        UnusableRow: it has no prompt that could be answered.
    """
    if isinstance(row, UnusableRow):
        raise row
    if not isinstance(row, dict):
        raise UnusableRow(f"the row is a {type(row).__name__}, not an object")
    messages = prompt_messages(row, kept=keep)
    return make_prompt(messages, row.get("prompt_id"), columns=kept_columns(row, keep))


def make_prompt(messages: Sequence[Turn], given: Any, *, columns: dict[str, Any] | None = None) -> Prompt:
    """Give messages the id that their row names, or the hash of their content -> Prompt."""
    turns = tuple(messages)
    if given is None or given == "":
        return Prompt(prompt_id=_content_hash(turns)[:16], messages=turns, columns=columns)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise UnusableRow("prompt_id is neither a string nor an integer")
    prompt_id = str(given)
    refuse_bad_text(prompt_id, "prompt_id")
    return Prompt(prompt_id=prompt_id, messages=turns, columns=columns)


class _Seen:
    """What rows before had, in some 300 bytes each: neither of their texts is kept."""

    def __init__(self) -> None:
        self._first_row_of_id: dict[str, int] = {}
        self._id_of_content: dict[bytes, str] = {}

    def refuse_duplicate(self, prompt: Prompt, number: int) -> None:
        content = bytes.fromhex(_content_hash(prompt.messages))
        if content in self._id_of_content:
            raise UnusableRow(f"the same text as prompt {self._id_of_content[content]}")
        if prompt.prompt_id in self._first_row_of_id:
            raise UnusableRow(f"the same prompt_id as row {self._first_row_of_id[prompt.prompt_id]}")
        self._first_row_of_id[prompt.prompt_id] = number
        self._id_of_content[content] = prompt.prompt_id


def _content_hash(messages: tuple[Turn, ...]) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def _name_of(row: Any, number: int) -> str:
    given = row.get("prompt_id") if isinstance(row, dict) else None
    if isinstance(given, str) and given and given.isprintable():
        return given
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else f"row-{number}"
