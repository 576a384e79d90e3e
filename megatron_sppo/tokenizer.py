"""A tokenizer's identity, from its files alone: the same hash in rollouts, datasets and checkpoints, or a refusal.

Only the files that decide token ids count. Chat template and special-token settings change texts, not ids; they are
hashed apart (`chat_template_hash` in the rollout manifest).
"""

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
