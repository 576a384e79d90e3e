"""Rollout directories for the judge's tests, written through the rollouts' own writer or, for bad rows, by hand."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sppo.rollout.records import RolloutGroup, RolloutManifest, ShardEntry, write_manifest, write_shard
from tests.unit.judge.groups import random_group

VOCAB_SIZE = 1000


def write_rollouts(directory: Path, groups: Sequence[RolloutGroup], *, rows_per_shard: int) -> Path:
    """Write groups as a complete rollout directory -> the directory."""
    starts = range(0, len(groups), rows_per_shard)
    entries = [
        write_shard(directory, number, groups[start : start + rows_per_shard]) for number, start in enumerate(starts)
    ]
    return _finish(directory, entries, num_responses=len(groups[0].responses))


def random_rollouts(
    directory: Path, *, num_prompts: int, num_responses: int, rows_per_shard: int, seed: int = 8
) -> Path:
    """Write random groups -> the directory."""
    rng = random.Random(seed)
    groups = [random_group(rng, number, num_responses, high=12) for number in range(num_prompts)]
    return write_rollouts(directory, groups, rows_per_shard=rows_per_shard)


def write_raw_rollouts(directory: Path, shards: Sequence[Sequence[bytes]], *, num_responses: int) -> Path:
    """Write lines as they are, with true checksums: what a foreign producer may leave -> the directory."""
    directory.mkdir(parents=True)
    entries = []
    for number, lines in enumerate(shards):
        content = b"".join(line + b"\n" for line in lines)
        name = f"shard-{number:05d}.jsonl"
        (directory / name).write_bytes(content)
        entries.append(ShardEntry(file=name, rows=len(lines), sha256=hashlib.sha256(content).hexdigest()))
    return _finish(directory, entries, num_responses=num_responses)


def raw_row(prompt_id: str = "p", **changes: Any) -> dict[str, Any]:
    """Make a good row of two responses, then change it -> JSON object."""
    row = {
        "schema_version": 1,
        "prompt_id": prompt_id,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "prompt_token_ids": [1, 2, 3],
        "responses": [raw_response("The sky scatters blue light."), raw_response("It is the air.")],
        "prompt_text": None,
    }
    return row | changes


def raw_response(text: Any, **changes: Any) -> dict[str, Any]:
    """Make a good response, then change it -> JSON object."""
    return {"text": text, "token_ids": [4, 5], "finish_reason": "stop", "seed": None} | changes


def encoded(row: Any) -> bytes:
    """Spell a row as ASCII JSON, lone surrogates as escapes -> bytes."""
    return json.dumps(row).encode()


def _finish(directory: Path, entries: Sequence[ShardEntry], *, num_responses: int) -> Path:
    manifest = RolloutManifest(
        schema_version=1,
        model="tiny",
        model_hash=None,
        tokenizer_hash="0" * 64,
        chat_template_hash=None,
        vocab_size=VOCAB_SIZE,
        sampling={"num_responses": num_responses, "temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "seed": 0},
        num_prompts=sum(entry.rows for entry in entries),
        shards=tuple(entries),
        quarantined=(),
    )
    write_manifest(directory, manifest)
    return directory
