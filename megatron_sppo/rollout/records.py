"""Rollouts on disk: `shard-00000.jsonl`, ... and `manifest.json`, which is written last and names them all.

A row is one prompt with its K responses, token ids as the sampler emitted them. Nothing here ever tokenises: ids are
made once, by the sampler's tokenizer, and travel unchanged to the loss. Standard library only, so that every stage may
read rollouts. Keys that this version does not know are ignored: a producer may add its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import DataError
from megatron_sppo.storage import atomic_file, contained, read_json, sha256_of_file, write_json

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

_MAX_TOKEN_ID = 2**31 - 1  # token files are int32
_HEX_DIGITS = frozenset("0123456789abcdef")
_WRITE_AGAIN = "Write the rollouts again."


@dataclass(frozen=True, kw_only=True)
class Response:
    """One sampled answer."""

    text: str
    token_ids: tuple[int, ...]
    """As emitted: the end-of-turn token is in it if and only if the model produced it."""
    finish_reason: str
    """"stop" when the model ended its turn, "length" when it was cut at max_tokens."""
    seed: int | None
    """Seed of this response alone; None where the engine was seeded as a whole."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """One prompt and its K responses: a row of a shard."""

    prompt_id: str
    messages: tuple[dict[str, str], ...]
    """Chat turns, each {"role", "content"}."""
    prompt_token_ids: tuple[int, ...]
    responses: tuple[Response, ...]
    prompt_text: str | None
    """The templated prompt whose ids `prompt_token_ids` are; None where the producer did not keep it."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest says of a shard."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RolloutManifest:
    """What made the rollouts, and all of their files. A hash that the producer did not know is None: unchecked."""

    schema_version: int
    model: str
    model_hash: str | None
    tokenizer_hash: str | None
    chat_template_hash: str | None
    vocab_size: int | None
    sampling: dict[str, Any]
    """num_responses, temperature, top_p, max_tokens, seed, stop_token_ids, chat_template_kwargs."""
    num_prompts: int
    """Prompts with responses: the rows of all shards."""
    shards: tuple[ShardEntry, ...]
    quarantined: tuple[dict[str, str], ...]
    """Prompts that were left out, each {"prompt_id", "reason"}."""
    outcomes: dict[str, int] | None = None
    """What became of the answers (`outcomes.count_outcomes`); None: not counted."""


def shard_name(index: int) -> str:
    """Name shard `index` -> "shard-00000.jsonl"."""
    return f"shard-{index:05d}.jsonl"


def write_shard(directory: Path, index: int, groups: Iterable[RolloutGroup]) -> ShardEntry:
    """Write one shard atomically, a row a group -> its manifest entry.

    Raises:
        DataError: a text that UTF-8 cannot hold, or a disk that takes no more.
    """
    name, rows, digest = shard_name(index), 0, hashlib.sha256()
    path = Path(directory, name)
    with atomic_file(path, "wb") as file:
        for group in groups:
            row = {"schema_version": SCHEMA_VERSION, **asdict(group)}
            try:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            except UnicodeEncodeError:
                raise DataError(
                    f"{path}: a text of prompt {group.prompt_id!r} holds half a surrogate pair. Remove that prompt."
                ) from None
            digest.update(line)
            file.write(line)
            rows += 1
    return ShardEntry(file=name, rows=rows, sha256=digest.hexdigest())


def write_manifest(directory: Path, manifest: RolloutManifest) -> Path:
    """Write `manifest.json` -> its path. Call it last: its presence says that the rollouts are complete."""
    path = Path(directory, MANIFEST_NAME)
    write_json(path, asdict(manifest))
    return path


def read_manifest(directory: Path) -> RolloutManifest:
    """Read and check `DIR/manifest.json` -> RolloutManifest.

    Raises:
        DataError: no such directory or manifest (the rollouts are unfinished), or a missing or impossible field.
    """
    path = Path(directory, MANIFEST_NAME)
    if not Path(directory).is_dir():
        raise DataError(f"{directory} is no directory of rollouts. Write it with tools/generate_rollouts.py.")
    if not path.is_file():
        raise DataError(
            f"{directory} has no {MANIFEST_NAME}: the rollouts are unfinished. "
            "Run the same generate_rollouts.py command again; finished shards are kept."
        )
    value = read_json(path)
    fault = _manifest_fault(value)
    if fault is not None:
        raise DataError(f"{path}: {fault}. {_WRITE_AGAIN}")
    shards = tuple(ShardEntry(file=s["file"], rows=s["rows"], sha256=s["sha256"]) for s in value["shards"])
    return RolloutManifest(
        schema_version=value["schema_version"],
        model=value["model"],
        model_hash=value["model_hash"],
        tokenizer_hash=value["tokenizer_hash"],
        chat_template_hash=value["chat_template_hash"],
        vocab_size=value.get("vocab_size"),
        sampling=value["sampling"],
        num_prompts=value["num_prompts"],
        shards=shards,
        quarantined=tuple(value["quarantined"]),
        outcomes=value.get("outcomes"),
    )


def read_shard(
    directory: Path, entry: ShardEntry, *, vocab_size: int | None = None, num_responses: int | None = None
) -> Iterator[RolloutGroup]:
    """Read one shard, its checksum before its first row -> groups in file order.

    Args:
        vocab_size: every token id must be below it; None leaves that unchecked.
        num_responses: K that every row must have; None leaves that unchecked.

    Raises:
        DataError: the shard is missing, damaged, or has a row that is no rollout; names the file and the row.
    """
    path = contained(Path(directory), entry.file)
    if not path.is_file():
        raise DataError(f"{path} does not exist, but the manifest names it. {_WRITE_AGAIN}")
    if sha256_of_file(path) != entry.sha256:
        raise DataError(f"{path} is damaged: its sha256 is not the manifest's ({entry.sha256[:12]}...). {_WRITE_AGAIN}")
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, row {number}: not valid JSON ({error}). {_WRITE_AGAIN}") from None
            fault = _row_fault(row, vocab_size=vocab_size, num_responses=num_responses)
            if fault is not None:
                raise DataError(f"{path}, row {number}: {fault}. {_WRITE_AGAIN}")
            yield _group(row)
    if number != entry.rows:
        raise DataError(f"{path} has {number} rows, the manifest says {entry.rows}. {_WRITE_AGAIN}")


def read_rollouts(directory: Path) -> Iterator[RolloutGroup]:
    """Read all shards in the manifest's order -> groups.

    Raises:
        DataError: as `read_manifest` and `read_shard`; or a prompt_id occurs twice.
    """
    manifest = read_manifest(directory)
    seen: set[str] = set()
    for entry in manifest.shards:
        groups = read_shard(
            directory, entry, vocab_size=manifest.vocab_size, num_responses=manifest.sampling["num_responses"]
        )
        for group in groups:
            if group.prompt_id in seen:
                path = Path(directory, entry.file)
                raise DataError(f"{path}: the prompt_id {group.prompt_id!r} occurs twice. {_WRITE_AGAIN}")
            seen.add(group.prompt_id)
            yield group


def _group(row: dict[str, Any]) -> RolloutGroup:
    responses = tuple(
        Response(text=r["text"], token_ids=tuple(r["token_ids"]), finish_reason=r["finish_reason"], seed=r["seed"])
        for r in row["responses"]
    )
    return RolloutGroup(
        prompt_id=row["prompt_id"],
        messages=tuple({"role": turn["role"], "content": turn["content"]} for turn in row["messages"]),
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        responses=responses,
        prompt_text=row.get("prompt_text"),
    )


def _manifest_fault(value: Any) -> str | None:
    """Say what is wrong with a manifest -> one clause, or None."""
    required = ("model", "model_hash", "tokenizer_hash", "chat_template_hash", "sampling", "num_prompts", "shards")
    fault = _object_fault(value, required=(*required, "quarantined"))
    if fault is not None:
        return fault
    if not isinstance(value["model"], str):
        return f"model is {value['model']!r}, not a string"
    for name in ("model_hash", "tokenizer_hash", "chat_template_hash"):
        if value[name] is not None and not _is_sha256(value[name]):
            return f"{name} is {value[name]!r}, neither 64 hex digits nor null"
    if value.get("vocab_size") is not None and not _is_int(value["vocab_size"], low=1):
        return f"vocab_size is {value['vocab_size']!r}, neither a positive integer nor null"
    sampling = value["sampling"]
    if not isinstance(sampling, dict) or not _is_int(sampling.get("num_responses"), low=1):
        return "sampling has no positive integer num_responses"
    if not isinstance(value["shards"], list) or not isinstance(value["quarantined"], list):
        return "shards and quarantined must be lists"
    for number, entry in enumerate(value["shards"]):
        if not (isinstance(entry, dict) and isinstance(entry.get("file"), str) and _is_int(entry.get("rows"), low=0)):
            return f"shards[{number}] lacks file or rows"
        if not _is_sha256(entry.get("sha256")):
            return f"shards[{number}] ({entry['file']}) has no sha256 of 64 hex digits"
    for number, entry in enumerate(value["quarantined"]):
        if not (isinstance(entry, dict) and isinstance(entry.get("prompt_id"), str)):
            return f"quarantined[{number}] has no prompt_id"
        if not isinstance(entry.get("reason"), str):
            return f"quarantined[{number}] has no reason"
    outcomes = value.get("outcomes")
    if outcomes is not None and not (
        isinstance(outcomes, dict) and all(_is_int(count, low=0) for count in outcomes.values())
    ):
        return "outcomes does not hold counts"
    rows = sum(entry["rows"] for entry in value["shards"])
    if value["num_prompts"] != rows:
        return f"num_prompts is {value['num_prompts']!r}, but the shards hold {rows} rows"
    return None


def _row_fault(row: Any, *, vocab_size: int | None, num_responses: int | None) -> str | None:
    """Say what is wrong with a shard's row -> one clause, or None."""
    fault = _object_fault(row, required=("prompt_id", "messages", "prompt_token_ids", "responses"))
    if fault is not None:
        return fault
    if not isinstance(row["prompt_id"], str) or not row["prompt_id"]:
        return f"prompt_id is {row['prompt_id']!r}, not a non-empty string"
    if row.get("prompt_text") is not None and not isinstance(row["prompt_text"], str):
        return "prompt_text is neither a string nor null"
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "messages is not a non-empty list"
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            return f"messages[{number}] has no string role and content"
    if not row["prompt_token_ids"]:
        return "prompt_token_ids is empty"
    fault = _token_fault(row["prompt_token_ids"], "prompt_token_ids", vocab_size)
    if fault is not None:
        return fault
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        return "responses is not a non-empty list"
    if num_responses is not None and len(responses) != num_responses:
        return f"{len(responses)} responses, but the manifest says num_responses {num_responses}"
    for number, response in enumerate(responses):
        fault = _response_fault(response, f"responses[{number}]", vocab_size)
        if fault is not None:
            return fault
    return None


def _response_fault(response: Any, place: str, vocab_size: int | None) -> str | None:
    if not isinstance(response, dict):
        return f"{place} is no JSON object"
    for key in ("text", "token_ids", "finish_reason", "seed"):
        if key not in response:
            return f"{place} lacks {key}"
    if not isinstance(response["text"], str) or not isinstance(response["finish_reason"], str):
        return f"{place} has a text or finish_reason that is no string"
    if response["seed"] is not None and not _is_int(response["seed"]):
        return f"{place}.seed is {response['seed']!r}, neither an integer nor null"
    return _token_fault(response["token_ids"], f"{place}.token_ids", vocab_size)


def _token_fault(token_ids: Any, place: str, vocab_size: int | None) -> str | None:
    if not isinstance(token_ids, list):
        return f"{place} is no list"
    high = _MAX_TOKEN_ID if vocab_size is None else vocab_size - 1
    for position, token in enumerate(token_ids):
        if not _is_int(token, low=0, high=high):
            return f"{place}[{position}] is {token!r}, not a token id in 0..{high}"
    return None


def _object_fault(value: Any, *, required: tuple[str, ...]) -> str | None:
    if not isinstance(value, dict):
        return "not a JSON object"
    if value.get("schema_version") != SCHEMA_VERSION:
        return f"schema_version is {value.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
    missing = [key for key in required if key not in value]
    return f"lacks {', '.join(missing)}" if missing else None


def _is_int(value: Any, *, low: int | None = None, high: int | None = None) -> bool:
    """Tell an integer in [low, high]; JSON's true is none, although Python's bool is an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return (low is None or value >= low) and (high is None or value <= high)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and _HEX_DIGITS.issuperset(value)


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
    return _stray_token_fault(content.get("prompt_token_ids"), "prompt_token_ids", vocab_size)


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
        fault = _stray_token_fault(response.get("token_ids"), f"{place}.token_ids", vocab_size)
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


def _stray_token_fault(token_ids: Any, place: str, vocab_size: int | None) -> str | None:
    if not isinstance(token_ids, list) or not token_ids:
        return f"{place} is not a non-empty list"
    limit = 2**31 if vocab_size is None else vocab_size
    for token in token_ids:
        if type(token) is not int or not 0 <= token < limit:
            return f"{place} holds {str(token)[:40]}, not a token id below {limit}"
    return None
