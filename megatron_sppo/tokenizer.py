"""A tokenizer's identity, from its files alone: the same hash in rollouts, datasets and checkpoints, or a refusal.

Only the files that decide token ids count. Chat template and special-token settings change texts, not ids; they are
hashed apart (`chat_template_hash` in the rollout manifest).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sppo.storage import sha256_of_file, sha256_of_json

ID_FILES = ("tokenizer.json", "tokenizer.model", "spm.model", "vocab.json", "merges.txt")
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
    """Hash the id-deciding tokenizer files of a Hugging Face directory -> 64 hex digits, or None if it has none."""
    found = {name: sha256_of_file(Path(directory, name)) for name in ID_FILES if Path(directory, name).is_file()}
    return sha256_of_json(found) if found else None


def token_texts(directory: Path) -> Callable[[Sequence[int]], list[str]] | None:
    """Open a directory's tokenizer.json -> a function that gives each token of a sequence its part of the text.

    The parts join to the whole text. Of tokens that share a character the last one gets it, the others are empty.
    None where there is no tokenizer.json.
    """
    path = Path(directory, "tokenizer.json")
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))

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
