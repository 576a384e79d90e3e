"""What a preference dataset says about itself: manifest.json, the names of its files, the selection grammar.

No torch and no numpy, so that every layer may read a manifest.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import msgspec

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import read_json, sha256_of_json, write_json
from megatron_sppo.objective.names import PreferenceRule

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
COLUMNS = ("tokens", "win_rates", "preferences", "judge_logits")
"""The indexed datasets of a preference dataset; each is a pair of .bin and .idx files."""
PROMPTS_NAME = "prompts.jsonl"
"""One line per prompt group, in order: its prompt_id and whatever the report wants to know of it."""

T = TypeVar("T")
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]

_REMEDY = "Score the rollouts again."


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


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a dataset."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    bytes: Annotated[int, msgspec.Meta(ge=0)]


class LeftOut(TypedDict):
    """A prompt group that the dataset does not hold, and why."""

    prompt_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """Everything about a preference dataset that is not in its arrays."""

    schema_version: Literal[1]
    num_prompts: PositiveInt
    num_responses: PositiveInt
    """K, the same for every prompt."""
    tokenizer_hash: str | None
    """megatron_sppo.checkpoints.tokenizer.tokenizer_hash of the policy; None when the producer did not know it."""
    vocab_size: PositiveInt | None
    judge: str
    preset: PreferenceRule
    """Rule that made preferences from judge logits."""
    selection: str
    files: dict[str, FileEntry]
    rollouts_sha256: str | None
    """Hash of the rollouts' manifest."""
    quarantined: tuple[LeftOut, ...]

    @property
    def dataset_hash(self) -> str:
        """Hash of the contents, the same for the same arrays wherever they lie; reference log-probs do not enter."""
        return sha256_of_json(msgspec.to_builtins(self.files))


def write_manifest(directory: Path, manifest: DatasetManifest) -> None:
    """Write manifest.json with a checksum of itself; to be called last, when every file that it names is in place."""
    write_signed(Path(directory, MANIFEST_NAME), msgspec.to_builtins(manifest))


def read_manifest(directory: Path) -> DatasetManifest:
    """Read and check manifest.json -> DatasetManifest. The files that it names are not opened.

    Raises:
        DataError: it is missing, damaged or of another schema version; the message names the file and the key.
    """
    path = Path(directory, MANIFEST_NAME)
    if not Path(directory).is_dir():
        raise DataError(f"{directory} is not a directory. Give --data the directory that `megatron-sppo score` wrote.")
    fields = read_signed(path, schema_version=SCHEMA_VERSION, remedy=_REMEDY)
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(DatasetManifest)})
    if unknown:
        raise DataError(f"{path} has unknown keys {unknown}. It is damaged: score the rollouts again.")
    entries = fields.get("files")
    if not isinstance(entries, dict) or set(entries) != set(file_names()):
        raise DataError(f"{path}: files does not hold exactly the names {', '.join(file_names())}. {_REMEDY}")
    for name, entry in entries.items():
        _convert(entry, FileEntry, place=f"{path}, {name}")
    manifest = _convert(fields, DatasetManifest, place=str(path))
    try:
        parse_selection(manifest.selection)
    except ConfigError as error:
        raise DataError(f"{path}: {error} {_REMEDY}") from None
    return manifest


def _convert(value: Any, of: type[T], *, place: str) -> T:
    try:
        return msgspec.convert(value, of)
    except ValueError as error:  # msgspec's own, or half a surrogate pair
        raise DataError(f"{place}: {error}. {_REMEDY}") from None


def write_signed(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON object with a checksum of itself."""
    write_json(path, {**fields, "manifest_sha256": sha256_of_json(fields)})


def read_signed(path: Path, *, schema_version: int, remedy: str) -> dict[str, Any]:
    """Read what `write_signed` wrote -> the fields without the checksum.

    Raises:
        DataError: missing, no JSON object, of another schema version, or other than its checksum says.
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise DataError(f"{path} holds no JSON object. {remedy}")
    # The version goes first: another version may have other keys.
    version = fields.get("schema_version")
    if version != schema_version or isinstance(version, bool):
        raise DataError(f"{path} has schema_version {version!r}, this release reads {schema_version}. {remedy}")
    claimed = fields.pop("manifest_sha256", None)
    try:
        actual = sha256_of_json(fields)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be hashed ({error}). It is damaged. {remedy}") from None
    if claimed != actual:
        raise DataError(f"{path} does not match its own manifest_sha256. It is damaged or edited. {remedy}")
    return fields
