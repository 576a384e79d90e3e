"""Rollouts on disk: `shard-00000.jsonl`, ... and `manifest.json`, which is written last and names them all.

A row is one prompt with its K responses, token ids as the sampler emitted them. Nothing here ever tokenises: ids are
made once, by the sampler's tokenizer, and travel unchanged to the loss. The types below say what a row and a manifest
are, and `msgspec` reads by them. Keys that this version does not know are ignored: a producer may add its own.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypedDict

import msgspec

from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json_as, write_json
from megatron_sppo.rollout.texts import text_fault
from megatron_sppo.storage import atomic_file, contained

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"

_MAX_TOKEN_ID = 2**31 - 1  # token files are int32
ROLES = ("system", "user", "assistant")
_WRITE_AGAIN = "Write the rollouts again."
_MOST_HELD_BYTES = 1 << 26
"""Of a shard: a thousand prompts with five answers of 400 tokens are half of it."""

Count = Annotated[int, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKEN_ID)]


class Turn(TypedDict):
    """What one speaker says."""

    role: str
    content: str


class SetAside(TypedDict):
    """A prompt that was left out, and why: one clause."""

    prompt_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Response:
    """One sampled answer."""

    text: str
    token_ids: tuple[TokenId, ...]
    """As emitted: the end-of-turn token is in it if and only if the model produced it."""
    finish_reason: str
    """"stop" when the model ended its turn, "length" when it was cut at max_tokens."""
    seed: int | None
    """Seed of this response alone; None where the engine was seeded as a whole."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """One prompt and its K responses: a row of a shard."""

    prompt_id: Annotated[str, msgspec.Meta(min_length=1)]
    messages: Annotated[tuple[Turn, ...], msgspec.Meta(min_length=1)]
    prompt_token_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1)]
    responses: Annotated[tuple[Response, ...], msgspec.Meta(min_length=1)]
    prompt_text: str | None = None
    """The templated prompt whose ids `prompt_token_ids` are; None where the producer did not keep it."""
    columns: dict[str, Any] | None = None
    """What judges check answers against, such as IFEval's instruction_id_list and kwargs; None, and then not in the
    row: nothing."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest says of a shard."""

    file: str
    rows: Count
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class EngineSteps:
    """How full an engine was, which computes up to a number of responses (its slots) at once, step by step."""

    total: Count
    under_half: Count
    """Those with fewer than half of the slots busy: the tails, in which the engine waits for its longest answers."""


@dataclass(frozen=True, kw_only=True)
class RolloutManifest:
    """What made the rollouts, and all of their files. A hash that the producer did not know is None: unchecked."""

    schema_version: Literal[1]
    model: str
    model_hash: Sha256 | None
    tokenizer_hash: Sha256 | None
    chat_template_hash: Sha256 | None
    vocab_size: Annotated[int, msgspec.Meta(ge=1)] | None = None
    sampling: dict[str, Any]
    """num_responses, temperature, top_p, max_tokens, seed, stop_token_ids, chat_template_kwargs."""
    num_prompts: int
    """Prompts with responses: the rows of all shards."""
    shards: tuple[ShardEntry, ...]
    quarantined: tuple[SetAside, ...]
    outcomes: dict[str, Count] | None = None
    """What became of the answers (`outcomes.count_outcomes`); None: not counted."""
    engine_steps: EngineSteps | None = None
    """None: not counted, as with servers."""
    adapter: str | None = None
    """The LoRA adapter that was on top of `model`; None: the model itself sampled."""
    adapter_hash: Sha256 | None = None
    """Its `PeftAdapter.adapter_hash`; `model_hash` is its base's."""

    @property
    def num_responses(self) -> int:
        """K, the responses of every prompt."""
        return int(self.sampling["num_responses"])


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
            try:
                line = _line(group)
            except UnicodeEncodeError:
                raise DataError(
                    f"{path}: a text of prompt {group.prompt_id!r} holds half a surrogate pair. Remove that prompt."
                ) from None
            digest.update(line)
            file.write(line)
            rows += 1
    return ShardEntry(file=name, rows=rows, sha256=digest.hexdigest())


def _line(group: RolloutGroup) -> bytes:
    """Spell a group as a line of a shard -> bytes. Not by `asdict`, which copies every token by itself."""
    row = {"schema_version": SCHEMA_VERSION, **vars(group), "responses": list(map(vars, group.responses))}
    if group.columns is None:
        del row["columns"]  # rows without them stay as earlier versions wrote them, to the byte
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_manifest(directory: Path, manifest: RolloutManifest) -> Path:
    """Write `manifest.json` -> its path. Call it last: its presence says that the rollouts are complete."""
    path = Path(directory, MANIFEST_NAME)
    content = asdict(manifest)
    for name in ("engine_steps", "adapter", "adapter_hash"):
        if content[name] is None:
            del content[name]  # what versions before wrote stays the same to the byte when it is written again
    write_json(path, content, seal=True)
    return path


def read_manifest(directory: Path) -> RolloutManifest:
    """Read and check `DIR/manifest.json` -> RolloutManifest.

    Raises:
        DataError: no such directory or manifest (the rollouts are unfinished), or a missing or impossible field.
    """
    path = Path(directory, MANIFEST_NAME)
    if not Path(directory).is_dir():
        raise DataError(f"{directory} is not a directory of rollouts. Write it with `megatron-sppo rollouts`.")
    if not path.is_file():
        raise DataError(
            f"{directory} has no {MANIFEST_NAME}: the rollouts are unfinished. "
            "Run the same `megatron-sppo rollouts` command again; finished shards are kept."
        )
    # The version goes first: another version may have other keys.
    version = read_json_as(path, dict[str, Any], remedy=_WRITE_AGAIN).get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: {_other_version(version)}. {_WRITE_AGAIN}")
    manifest = read_json_as(path, RolloutManifest, remedy=_WRITE_AGAIN)
    num_responses = manifest.sampling.get("num_responses")
    if type(num_responses) is not int or num_responses < 1:
        raise DataError(f"{path}: sampling has no positive integer num_responses. {_WRITE_AGAIN}")
    rows = sum(entry.rows for entry in manifest.shards)
    if manifest.num_prompts != rows:
        raise DataError(
            f"{path}: num_prompts is {manifest.num_prompts}, but the shards hold {rows} rows. {_WRITE_AGAIN}"
        )
    return manifest


def read_rollouts(directory: Path) -> Iterator[RolloutGroup]:
    """Read all shards in the manifest's order -> groups.

    Raises:
        DataError: as `read_manifest` and `read_shard`; or a prompt_id occurs twice.
    """
    manifest = read_manifest(directory)
    seen: set[str] = set()
    for entry in manifest.shards:
        for group in read_shard(directory, entry, vocab_size=manifest.vocab_size, num_responses=manifest.num_responses):
            if group.prompt_id in seen:
                path = Path(directory, entry.file)
                raise DataError(f"{path}: the prompt_id {group.prompt_id!r} occurs twice. {_WRITE_AGAIN}")
            seen.add(group.prompt_id)
            yield group


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
    for number, row in _rows(directory, entry, vocab_size=vocab_size, num_responses=num_responses):
        if isinstance(row, _RowFault):
            raise DataError(f"{Path(directory, entry.file)}, row {number}: {row}. {_WRITE_AGAIN}")
        yield row


def read_rows(
    directory: Path,
    entry: ShardEntry,
    *,
    vocab_size: int | None,
    num_responses: int,
    content: bytes | None = None,
) -> Iterator[RolloutGroup | SetAside]:
    """Read one shard as `read_shard` does, for judging -> a group, or why there is none, for each line in file order.

    Set aside are rows that are no rollouts, and rollouts that a judge cannot compare or a policy cannot learn from: a
    conversation that does not end with the user, a text that is empty or that no tokenizer takes, an empty response.

    Args:
        content: the shard's bytes, where the directory is another machine's.

    Raises:
        DataError: the shard is missing, damaged or has another number of rows than its manifest says.
    """
    rows = _rows(directory, entry, vocab_size=vocab_size, num_responses=num_responses, content=content)
    for number, row in rows:
        if isinstance(row, _RowFault):
            yield SetAside(prompt_id=row.prompt_id or f"{entry.file}:{number}", reason=str(row))
        elif (reason := _unfit(row)) is not None:
            is_named = text_fault(row.prompt_id) is None
            yield SetAside(prompt_id=row.prompt_id if is_named else f"{entry.file}:{number}", reason=reason)
        else:
            yield row


def shard_bytes(directory: Path, entry: ShardEntry) -> bytes:
    """Read a shard as it lies on the disk, unchecked -> bytes.

    Raises:
        DataError: it is missing.
    """
    return _shard_path(directory, entry).read_bytes()


def read_group(line: bytes) -> RolloutGroup:
    """Read again one line of a shard that `read_shard` has gone through -> RolloutGroup."""
    return _group(line, vocab_size=None, num_responses=None)


class _RowFault(ValueError):
    """Why a line is no rollout, as a clause."""

    def __init__(self, reason: str, *, prompt_id: str | None = None) -> None:
        super().__init__(reason)
        self.prompt_id = prompt_id
        """What the line calls itself, where that can be read."""


def _shard_path(directory: Path, entry: ShardEntry) -> Path:
    path = contained(Path(directory), entry.file)
    if not path.is_file():
        raise DataError(f"{path} does not exist, but the manifest names it. {_WRITE_AGAIN}")
    return path


def _rows(
    directory: Path,
    entry: ShardEntry,
    *,
    vocab_size: int | None,
    num_responses: int | None,
    content: bytes | None = None,
) -> Iterator[tuple[int, RolloutGroup | _RowFault]]:
    """Check a shard's bytes, then read it line by line -> (row number from 1, group or fault)."""
    path = Path(directory, entry.file) if content is not None else _shard_path(directory, entry)
    number = 0
    with _verified(path, entry, content) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, _group(line, vocab_size=vocab_size, num_responses=num_responses)
            except _RowFault as fault:
                yield number, fault
    if number != entry.rows:
        raise DataError(f"{path} has {number} rows, the manifest says {entry.rows}. {_WRITE_AGAIN}")


def _verified(path: Path, entry: ShardEntry, content: bytes | None) -> IO[bytes]:
    """Check the bytes of a shard -> those bytes. It is read once, unless it is larger than what is held whole."""
    if content is None and path.stat().st_size <= _MOST_HELD_BYTES:
        content = path.read_bytes()
    file: IO[bytes] = open(path, "rb") if content is None else io.BytesIO(content)
    if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
        file.close()
        raise DataError(f"{path} is damaged: its sha256 is not the manifest's ({entry.sha256[:12]}...). {_WRITE_AGAIN}")
    file.seek(0)
    return file


def _group(line: bytes, *, vocab_size: int | None, num_responses: int | None) -> RolloutGroup:
    """Read a line of a shard -> RolloutGroup, or _RowFault raised."""
    try:
        # Not msgspec's own reader of JSON: it calls half a surrogate pair a truncated input.
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _RowFault(f"the row is not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise _RowFault("the row is not a JSON object")
    name = row.get("prompt_id")
    prompt_id = name if isinstance(name, str) and text_fault(name) is None else None
    if (version := row.get("schema_version")) != SCHEMA_VERSION:
        raise _RowFault(_other_version(version), prompt_id=prompt_id)
    try:
        group = msgspec.convert(row, RolloutGroup)
    except ValueError as error:
        raise _RowFault(str(error), prompt_id=prompt_id) from None
    if num_responses is not None and len(group.responses) != num_responses:
        raise _RowFault(f"{len(group.responses)} responses, expected {num_responses}", prompt_id=prompt_id)
    if vocab_size is not None and (fault := _foreign_token(group, vocab_size)) is not None:
        raise _RowFault(fault, prompt_id=prompt_id)
    return group


def _other_version(version: Any) -> str:
    return f"schema_version is {version!r}, this version reads {SCHEMA_VERSION}"


def _foreign_token(group: RolloutGroup, vocab_size: int) -> str | None:
    """Find a token id that the vocabulary does not have -> one clause, or None."""
    places = [("$.prompt_token_ids", group.prompt_token_ids)]
    places += [(f"$.responses[{k}].token_ids", response.token_ids) for k, response in enumerate(group.responses)]
    for place, token_ids in places:
        if max(token_ids, default=0) >= vocab_size:
            position, token = next((i, token) for i, token in enumerate(token_ids) if token >= vocab_size)
            return f"`{place}[{position}]` is {token}, not a token id in 0..{vocab_size - 1}"
    return None


def _unfit(group: RolloutGroup) -> str | None:
    """Say why a rollout can be neither judged nor learned from -> one clause, or None."""
    for number, turn in enumerate(group.messages):
        if turn["role"] not in ROLES:
            return f"messages[{number}] has no role of {', '.join(ROLES)}"
    if (fault := text_fault(group.prompt_id)) is not None:
        return f"prompt_id {fault}"
    if (fault := text_fault_of_group(group)) is not None:
        return fault
    if group.messages[-1]["role"] != "user":
        return "the last message is not the user's"
    if not group.messages[-1]["content"].strip():
        return "the user's last message is empty"
    for number, response in enumerate(group.responses):
        if not response.text.strip():
            return f"responses[{number}] has an empty text"
        if not response.token_ids:
            return f"responses[{number}].token_ids is empty"
    return None


def text_fault_of_group(group: RolloutGroup) -> str | None:
    """Say which text of a group no tokenizer takes -> one clause, or None."""
    texts = [("prompt_text", group.prompt_text or "")]
    texts += [(f"messages[{number}]", turn["content"]) for number, turn in enumerate(group.messages)]
    texts += [(f"responses[{number}]", response.text) for number, response in enumerate(group.responses)]
    return next((f"{place} {fault}" for place, text in texts if (fault := text_fault(text)) is not None), None)
