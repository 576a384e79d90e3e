"""A tokenizer's identity, from its files alone: the same hash in rollouts, datasets and checkpoints, or a refusal.

It is taken over what decides token ids (vocabulary, merges, normaliser, pre-tokeniser, post-processor, added tokens),
not over a file's spelling: a tokenizer that another version saved again is the same one. Chat template and
special-token settings change texts, not ids; they are hashed apart (`chat_template_hash` in the rollout manifest).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.storage import sha256_of_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
ID_FILES = (TOKENIZER_FILE, "tokenizer.model", "spm.model", "vocab.json", "merges.txt")
"""Files that decide which ids a text becomes."""

TEXT_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that travel with them."""


def tokenizer_hash(directory: Path) -> str | None:
    """Hash what a Hugging Face directory's tokenizer does -> 64 hex digits, or None if it has none.

    tokenizer.json alone decides where it is there and can be read, as in transformers; otherwise the files' bytes.
    """
    tokenizer = _open(directory)
    return file_hash(directory) if tokenizer is None else hash_of(tokenizer)


def hash_of(tokenizer: Tokenizer) -> str:
    """Hash what decides ids in an opened tokenizer.json, free of its spelling -> 64 hex digits.

    The library spells all fields out, defaults too; what it adds in a later version is null or false for older files,
    and left out here.
    """
    spelled = json.loads(tokenizer.to_str())
    decides = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
    meaning = {key: _without_absent(spelled[key]) for key in decides}
    meaning["added_tokens"] = sorted(meaning["added_tokens"] or [], key=lambda token: token.get("id", 0))
    return sha256_of_json(meaning)


def file_hash(directory: Path) -> str | None:
    """Hash the id-deciding files byte for byte, which was a tokenizer's identity before -> hex digits, or None."""
    found = {name: sha256_of_file(Path(directory, name)) for name in ID_FILES if Path(directory, name).is_file()}
    return sha256_of_json(found) if found else None


def is_tokenizer_of(directory: Path, recorded: Iterable[str | None]) -> bool:
    """Whether a directory's tokenizer is the one of a recorded hash, taken over its meaning or over its files."""
    return not {tokenizer_hash(directory), file_hash(directory)}.isdisjoint(recorded)


def parse_tokenizer(text: str) -> Tokenizer:
    """Parse a tokenizer.json by the library itself.

    Raises:
        ValueError: it is no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 (the library raises Exception itself)
        raise ValueError(f"no tokenizer: {error}") from None


def _open(directory: Path) -> Tokenizer | None:
    """Open a directory's tokenizer.json; None where there is none, or it is damaged (`check_side_files` says so)."""
    path = Path(directory, TOKENIZER_FILE)
    try:
        return parse_tokenizer(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None


def _without_absent(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_absent(item) for key, item in value.items() if item is not None and item is not False}
    return [_without_absent(item) for item in value] if isinstance(value, list) else value


def token_texts(directory: Path) -> Callable[[Sequence[int]], list[str]] | None:
    """Open a directory's tokenizer.json -> a function that gives each token of a sequence its part of the text.

    The parts join to the whole text. Of tokens that share a character the last one gets it, the others are empty.
    None where there is no tokenizer.json.
    """
    tokenizer = _open(directory)
    if tokenizer is None:
        return None

    def texts(token_ids: Sequence[int]) -> list[str]:
        parts: list[str] = []
        length = 0
        for end in range(1, len(token_ids) + 1):
            text = tokenizer.decode(list(token_ids[:end]), skip_special_tokens=False)
            is_whole = end == len(token_ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
            parts.append(text[length:] if is_whole else "")
            length = len(text) if is_whole else length
        return parts

    return texts
