"""Rollout rows as a judge may see them: a row that cannot be judged is set aside with its reason, never fatal.

Other producers than ours write rollouts too, so that nothing is taken on trust but the shard's checksum.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import DataError
from megatron_sppo.rollout.records import Response, RolloutGroup, ShardEntry
from megatron_sppo.storage import contained, sha256_of_file

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a shard: a group, or why it is none."""

    prompt_id: str
    group: RolloutGroup | None
    reason: str | None
    """One clause; None where there is a group."""


def read_rows(directory: Path, entry: ShardEntry, *, num_responses: int, vocab_size: int | None) -> Iterator[Row]:
    """Read one shard, its checksum first -> a Row a line, in file order.

    Raises:
        DataError: the shard is missing, damaged or has another number of rows than its manifest says.
    """
    path = contained(Path(directory), entry.file)
    remedy = "Write the rollouts again with tools/generate_rollouts.py."
    if not path.is_file():
        raise DataError(f"{path} does not exist, but the manifest names it. {remedy}")
    if sha256_of_file(path) != entry.sha256:
        raise DataError(f"{path} is damaged: its sha256 is not the manifest's ({entry.sha256[:12]}...). {remedy}")
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield _row(line, place=f"{entry.file}:{number}", num_responses=num_responses, vocab_size=vocab_size)
    if number != entry.rows:
        raise DataError(f"{path} has {number} rows, the manifest says {entry.rows}. {remedy}")


def _row(line: bytes, *, place: str, num_responses: int, vocab_size: int | None) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return Row(prompt_id=place, group=None, reason="the row is not valid JSON")
    if not isinstance(content, dict):
        return Row(prompt_id=place, group=None, reason="the row is no JSON object")
    prompt_id = content.get("prompt_id")
    if not isinstance(prompt_id, str) or not prompt_id or _text_fault(prompt_id):
        prompt_id = place
    reason = _prompt_fault(content, vocab_size) or _responses_fault(content.get("responses"), num_responses, vocab_size)
    if reason is not None:
        return Row(prompt_id=prompt_id, group=None, reason=reason)
    group = RolloutGroup(
        prompt_id=prompt_id,
        messages=tuple({"role": turn["role"], "content": turn["content"]} for turn in content["messages"]),
        prompt_token_ids=tuple(content["prompt_token_ids"]),
        responses=tuple(
            Response(
                text=response["text"],
                token_ids=tuple(response["token_ids"]),
                finish_reason=str(response.get("finish_reason")),
                seed=response.get("seed"),
            )
            for response in content["responses"]
        ),
        prompt_text=content.get("prompt_text"),
    )
    return Row(prompt_id=prompt_id, group=group, reason=None)


def _prompt_fault(content: dict[str, Any], vocab_size: int | None) -> str | None:
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        return "messages is not a non-empty list"
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            return f"messages[{number}] has no role of {', '.join(_ROLES)}"
        fault = _text_fault(turn.get("content"))
        if fault is not None:
            return f"messages[{number}] {fault}"
    if messages[-1]["role"] != "user":
        return "the last message is not the user's"
    if not messages[-1]["content"].strip():
        return "the user's last message is empty"
    prompt_text = content.get("prompt_text")
    if prompt_text is not None and _text_fault(prompt_text):
        return f"prompt_text {_text_fault(prompt_text)}"
    return _token_fault(content.get("prompt_token_ids"), "prompt_token_ids", vocab_size)


def _responses_fault(responses: Any, num_responses: int, vocab_size: int | None) -> str | None:
    if not isinstance(responses, list) or not responses:
        return "no responses"
    if len(responses) != num_responses:
        return f"{len(responses)} responses, expected {num_responses}"
    for number, response in enumerate(responses):
        place = f"responses[{number}]"
        if not isinstance(response, dict):
            return f"{place} is no JSON object"
        fault = _text_fault(response.get("text"))
        if fault is not None:
            return f"{place} {fault}"
        if not response["text"].strip():
            return f"{place} has an empty text"
        fault = _token_fault(response.get("token_ids"), f"{place}.token_ids", vocab_size)
        if fault is not None:
            return fault
    return None


def text_fault_of_group(group: RolloutGroup) -> str | None:
    """Say which text of a group no tokenizer takes -> one clause, or None."""
    texts = [(f"messages[{number}]", turn["content"]) for number, turn in enumerate(group.messages)]
    texts += [(f"responses[{number}]", response.text) for number, response in enumerate(group.responses)]
    texts += [("prompt_text", group.prompt_text)] if group.prompt_text is not None else []
    return next((f"{place} {fault}" for place, text in texts if (fault := _text_fault(text)) is not None), None)


def _text_fault(text: Any) -> str | None:
    if not isinstance(text, str):
        return "has no text"
    if "\x00" in text:
        return "holds a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half a surrogate pair"
    return None


def _token_fault(token_ids: Any, place: str, vocab_size: int | None) -> str | None:
    if not isinstance(token_ids, list) or not token_ids:
        return f"{place} is not a non-empty list"
    limit = 2**31 if vocab_size is None else vocab_size
    for token in token_ids:
        if type(token) is not int or not 0 <= token < limit:
            return f"{place} holds {str(token)[:40]}, not a token id below {limit}"
    return None
