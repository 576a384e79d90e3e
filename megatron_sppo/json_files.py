"""JSON files: written whole, some with a checksum of themselves, and read with the place of what is wrong."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from megatron_sppo.errors import DataError
from megatron_sppo.storage import atomic_file, damage

T = TypeVar("T")


def sha256_of_json(value: Any) -> str:
    """Hash a JSON value independently of key order and white space -> 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


SEAL = "content_sha256"
"""Key of a JSON object's checksum of everything else in it (`sealed`)."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add a checksum of itself to a JSON object, which `unsealed` checks -> the object with one more key, the last."""
    as_read = json.loads(json.dumps(content))  # tuples are lists there, and all keys texts
    return {**content, SEAL: sha256_of_json(as_read)}


def unsealed(content: Any, *, place: object) -> Any:
    """Check a JSON value's checksum of itself, where it has one -> the value without it.

    Raises:
        DataError: it is other than it was when it was sealed; the message begins with `place`.
    """
    if not isinstance(content, dict) or SEAL not in content:
        return content
    rest = {key: value for key, value in content.items() if key != SEAL}
    if sha256_of_json(rest) != content[SEAL]:
        raise DataError(
            f"{place}: it is not what was written ({SEAL} differs): damaged, or edited. Write it again; if you changed "
            f"it on purpose, remove its {SEAL}."
        )
    return rest


def write_json(path: Path, value: Any, *, seal: bool = False) -> None:
    """Write JSON atomically: two-space indent, keys in the order given, a newline at the end.

    Args:
        seal: add a checksum, by which every reader (`read_json`) finds damage; for what no manifest lists.
    """
    with atomic_file(Path(path)) as file:
        json.dump(sealed(value) if seal else value, file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file, and check it against its own checksum if it was written with one.

    Raises:
        DataError: the file is missing, unreadable, no JSON or not what was written; the message names it.
    """
    path = Path(path)
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")), place=path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Check the path, or run the step that writes it.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        fault = damage(path, f"{path} is not valid JSON ({error}). It is damaged: write it again.")
        raise DataError(fault) from None


def read_json_as(path: Path, of: type[T], *, remedy: str, str_keys: bool = False) -> T:
    """Read a JSON file whose content a type describes (a dataclass, a TypedDict, `msgspec.Meta` bounds) -> an instance.

    Args:
        remedy: what to do about a file that holds something else.
        str_keys: keys may be numbers that JSON spells as texts.

    Raises:
        DataError: as `read_json`; or the content is not of the type, the place named (`$.shards[0].rows`).
    """
    value = read_json(path)
    try:
        return msgspec.convert(value, of, str_keys=str_keys)
    except ValueError as error:
        raise DataError(f"{path}: {error}. {remedy}") from None
