"""The truth about a scored dataset's bytes: prompt after prompt, by the formats' own words, nothing of the package's
writers in it.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_sppo.objective import preference_matrix, win_rates
from megatron_sppo.rollout.records import RolloutGroup

MEGATRON_CODES = {"i": 4, "f": 7}
"""Of int32 and float32, megatron/core/datasets/indexed_dataset.py, class DType."""


def dataset_files(
    groups: Sequence[RolloutGroup],
    judge: Callable[[RolloutGroup], np.ndarray],
    *,
    rule: str,
    fields: dict[str, Any],
    quarantined: Sequence[dict[str, str]] = (),
) -> dict[str, bytes]:
    """Write groups one by one -> {name: content} of all files.

    Args:
        judge: logits of a group, [K, K] float32.
        fields: of the manifest: judge, selection, tokenizer_hash, vocab_size, rollouts_sha256.
        quarantined: the manifest's list.
    """
    columns: dict[str, list[list[Any]]] = {name: [] for name in ("tokens", "win_rates", "preferences", "judge_logits")}
    prompts = b""
    for group in groups:
        logits = judge(group)
        preferences = preference_matrix(torch.from_numpy(logits.copy()), rule=rule)
        columns["tokens"].append([list(group.prompt_token_ids), *(list(r.token_ids) for r in group.responses)])
        columns["win_rates"].append([win_rates(preferences).tolist()])
        columns["preferences"].append([preferences.flatten().tolist()])
        columns["judge_logits"].append([logits.flatten().tolist()])
        responses = [{"finish_reason": r.finish_reason, "text": r.text} for r in group.responses]
        line = {"messages": list(group.messages), "prompt_id": group.prompt_id, "responses": responses}
        prompts += json.dumps(line, sort_keys=True).encode() + b"\n"
    files: dict[str, bytes] = {}
    for name, documents in columns.items():
        kind = "i" if name == "tokens" else "f"
        sequences = [sequence for document in documents for sequence in document]
        files[f"{name}.bin"] = b"".join(struct.pack(f"<{len(s)}{kind}", *s) for s in sequences)
        lengths = [len(sequence) for sequence in sequences]
        pointers = [4 * sum(lengths[:place]) for place in range(len(lengths))]
        bounds = [sum(map(len, documents[:place])) for place in range(len(documents) + 1)]
        files[f"{name}.idx"] = (
            b"MMIDIDX\x00\x00"
            + struct.pack("<QBQQ", 1, MEGATRON_CODES[kind], len(lengths), len(bounds))
            + struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(bounds)}q", *lengths, *pointers, *bounds)
        )
    files["prompts.jsonl"] = prompts
    manifest = {
        "schema_version": 1,
        "num_prompts": len(groups),
        "num_responses": len(groups[0].responses),
        "tokenizer_hash": fields["tokenizer_hash"],
        "vocab_size": fields["vocab_size"],
        "judge": fields["judge"],
        "preset": rule,
        "selection": fields["selection"],
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in files.items()
        },
        "rollouts_sha256": fields["rollouts_sha256"],
        "quarantined": list(quarantined),
    }
    signed = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    files["manifest.json"] = json.dumps({**manifest, "manifest_sha256": signed}, indent=2).encode() + b"\n"
    return files
