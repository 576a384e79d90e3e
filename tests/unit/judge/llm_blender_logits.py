"""Run llm-blender 0.0.2 itself over cases in JSON and record its numbers, the reference of test_pairrm_parity.py.

Usage, from the root of the repository, PEER being the environment that benchmarks/llm_blender_peer.py describes:
    PEER/bin/python -m tests.unit.judge.llm_blender_logits CHECKPOINT CASES.json RESULTS.npz

Each case is {"source", "candidates"}; batch size 1, so that no case's truncation depends on another. Recorded, one
after the other over all cases: `logits` [sum of K * K], `scores` [sum of K] of `rank`, `compare` [cases] of the first
two.
"""

import json
import sys
from importlib import metadata

import numpy as np
import torch

from benchmarks.llm_blender_peer import load_blender


def main() -> None:
    """Record logits, scores and comparisons of every case."""
    checkpoint, cases_path, results_path = sys.argv[1:]
    with open(cases_path, encoding="utf-8") as file:
        cases = json.load(file)
    blender = load_blender(checkpoint, device="cpu")
    logits, scores, compare = [], [], []
    for case in cases:
        source, candidates = case["source"], case["candidates"]
        batch = blender.ranker_collator([{"source": source, "candidates": candidates, "scores": None}])
        with torch.no_grad():
            full = blender.ranker._full_predict(**{key: value for key, value in batch.items() if value is not None})
        logits.append(full["logits"][0].numpy().ravel())
        scores.append(blender.rank([source], [candidates], return_scores=True, batch_size=1)[0])
        compare.append(blender.compare([source], candidates[:1], candidates[1:2], return_logits=True)[0])
    np.savez_compressed(
        results_path,
        logits=np.concatenate(logits).astype(np.float32),
        scores=np.concatenate(scores).astype(np.float32),
        compare=np.array(compare, dtype=np.float32),
        versions=json.dumps({name: metadata.version(name) for name in ("llm-blender", "torch", "transformers")}),
    )


if __name__ == "__main__":
    main()
