"""What a preference dataset says about itself: manifest.json, the names of its files, the selection grammar.

Standard library only, so that every layer may read a manifest.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.storage import read_json, sha256_of_json, write_json

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
COLUMNS = ("tokens", "win_rates", "preferences", "judge_logits")
"""The indexed datasets of a preference dataset; each is a pair of .bin and .idx files."""
PROMPTS_NAME = "prompts.jsonl"
"""One line per prompt group, in order: its prompt_id and whatever the report wants to know of it."""
PRESETS = ("paper", "official")

_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_names() -> tuple[str, ...]:
    """List the files that a manifest must name -> .bin and .idx of each column, and the prompts file."""
    return (*(f"{column}.{suffix}" for column in COLUMNS for suffix in ("bin", "idx")), PROMPTS_NAME)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which responses of a prompt are trained on."""

    kind: str
    """"all", "extremes" or "top-bottom"."""
    num_each: int = 0
    """Responses taken from either end; 0 means all."""

    def __str__(self) -> str:
        return f"top-bottom:{self.num_each}" if self.kind == "top-bottom" else self.kind


def parse_selection(text: str) -> Selection:
    """Read "all", "extremes" or "top-bottom:M" -> Selection.

    Raises:
        ConfigError: anything else.
    """
    if text == "all":
        return Selection(kind="all")
    if text == "extremes":
        return Selection(kind="extremes", num_each=1)
    match = re.fullmatch(r"top-bottom:([1-9][0-9]{0,5})", text)
    if not match:
        raise ConfigError(
            f"selection {text!r} is unknown. Use --selection all, extremes or top-bottom:M, e.g. top-bottom:2."
        )
    return Selection(kind="top-bottom", num_each=int(match[1]))


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a dataset."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """Everything about a preference dataset that is not in its arrays."""

    schema_version: int
    num_prompts: int
    num_responses: int
    """K, the same for every prompt."""
    tokenizer_hash: str | None
    """megatron_sppo.checkpoints.tokenizer.tokenizer_hash of the policy; None when the producer did not know it."""
    vocab_size: int | None
    judge: str
    preset: str
    """Rule that made preferences from judge logits: "paper" or "official"."""
    selection: str
    files: dict[str, FileEntry]
    rollouts_sha256: str | None
    """Hash of the rollouts' manifest."""
    quarantined: tuple[dict[str, str], ...]
    """Prompt groups left out, each {"prompt_id", "reason"}."""

    @property
    def dataset_hash(self) -> str:
        """Hash of the contents, the same for the same arrays wherever they lie; reference log-probs do not enter."""
        return sha256_of_json({name: dataclasses.asdict(entry) for name, entry in self.files.items()})


def write_manifest(directory: Path, manifest: DatasetManifest) -> None:
    """Write manifest.json with a checksum of itself; to be called last, when every file that it names is in place."""
    fields = dataclasses.asdict(manifest)
    fields["quarantined"] = list(manifest.quarantined)
    write_json(Path(directory, MANIFEST_NAME), {**fields, "manifest_sha256": sha256_of_json(fields)})


def read_manifest(directory: Path) -> DatasetManifest:
    """Read and check manifest.json -> DatasetManifest. The files that it names are not opened.

    Raises:
        DataError: it is missing, damaged or of another schema version; the message names the file and the key.
    """
    path = Path(directory, MANIFEST_NAME)
    if not Path(directory).is_dir():
        raise DataError(f"{directory} is not a directory. Give --data the directory that `megatron-sppo score` wrote.")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise DataError(f"{path} holds {_kind(fields)}, not an object. Score the rollouts again.")
    # The version goes first: another version may have other keys.
    version = fields.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise DataError(
            f"{path} has schema_version {version!r}, this release reads {SCHEMA_VERSION}. Score the rollouts again."
        )
    names = [field.name for field in dataclasses.fields(DatasetManifest)]
    missing = [name for name in (*names, "manifest_sha256") if name not in fields]
    unknown = sorted(set(fields) - {*names, "manifest_sha256"})
    if missing or unknown:
        raise DataError(
            f"{path} lacks keys {missing} and has unknown keys {unknown}. It is damaged: score the rollouts again."
        )
    claimed = fields.pop("manifest_sha256")
    try:
        actual = sha256_of_json(fields)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be hashed ({error}). It is damaged: score the rollouts again.") from None
    if claimed != actual:
        raise DataError(
            f"{path} does not match its own manifest_sha256. It is damaged or edited: score the rollouts again."
        )
    return _checked(fields, path)


def _checked(fields: dict[str, Any], path: Path) -> DatasetManifest:
    """Check types and ranges -> DatasetManifest."""

    def refuse(key: str, wanted: str) -> None:
        value = json.dumps(fields[key], default=str)[:80]
        raise DataError(f"{path}: {key} is {value}, expected {wanted}. Score the rollouts again.")

    for key, least in (("num_prompts", 1), ("num_responses", 1)):
        if type(fields[key]) is not int or fields[key] < least:
            refuse(key, f"an integer >= {least}")
    if fields["vocab_size"] is not None and (type(fields["vocab_size"]) is not int or fields["vocab_size"] < 1):
        refuse("vocab_size", "null or a positive integer")
    for key in ("judge", "preset", "selection"):
        if not isinstance(fields[key], str):
            refuse(key, "a string")
    for key in ("tokenizer_hash", "rollouts_sha256"):
        if fields[key] is not None and not isinstance(fields[key], str):
            refuse(key, "null or a string")
    if fields["preset"] not in PRESETS:
        refuse("preset", "one of " + ", ".join(PRESETS))
    try:
        parse_selection(fields["selection"])
    except ConfigError:
        refuse("selection", "all, extremes or top-bottom:M")
    rows = fields["quarantined"]
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"prompt_id", "reason"} <= set(row) and all(isinstance(v, str) for v in row.values())
        for row in rows
    ):
        refuse("quarantined", "a list of {prompt_id, reason}")
    entries = fields["files"]
    if not isinstance(entries, dict) or set(entries) != set(file_names()):
        refuse("files", f"exactly the names {', '.join(file_names())}")
    return DatasetManifest(
        **{
            **fields,
            "files": {name: _file_entry(name, entries[name], path) for name in entries},
            "quarantined": tuple(rows),
        }
    )


def _file_entry(name: str, entry: Any, path: Path) -> FileEntry:
    if not (
        isinstance(entry, dict)
        and set(entry) == {"sha256", "bytes"}
        and isinstance(entry["sha256"], str)
        and _SHA256.fullmatch(entry["sha256"])
        and type(entry["bytes"]) is int
        and entry["bytes"] >= 0
    ):
        raise DataError(f"{path}: files[{name!r}] is not {{sha256, bytes}}. It is damaged: score the rollouts again.")
    return FileEntry(sha256=entry["sha256"], bytes=entry["bytes"])


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}.get(
        type(value), "null"
    )
