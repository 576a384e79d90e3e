"""Run llm-blender 0.0.2 itself over cases in JSON and print its numbers: the parity reference, in its own environment.

Usage: python llm_blender_logits.py CHECKPOINT CASES.json RESULTS.npz. Each case is {"source", "candidates"}; batch size
1, so that no case's truncation depends on another.
"""

import json
import sys

import numpy as np
import torch
import transformers.utils.hub
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import PreTrainedTokenizerBase

# transformers 5 dropped both names; llm-blender 0.0.2 imports one and calls the other.
if not hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):
    transformers.utils.hub.TRANSFORMERS_CACHE = HF_HUB_CACHE
if not hasattr(PreTrainedTokenizerBase, "batch_encode_plus"):
    PreTrainedTokenizerBase.batch_encode_plus = lambda self, texts, **options: self(texts, **options)

import llm_blender

RANK_EVERY = 10  # `rank` and `compare` run the same forwards once more, one by one


def main() -> None:
    checkpoint, cases_path, results_path = sys.argv[1:]
    with open(cases_path, encoding="utf-8") as file:
        cases = json.load(file)
    blender = llm_blender.Blender(blender_config=llm_blender.BlenderConfig(device="cpu", use_tqdm=False))
    blender.loadranker(checkpoint, device="cpu")
    results = {}
    for number, case in enumerate(cases):
        batch = blender.ranker_collator([{"source": case["source"], "candidates": case["candidates"], "scores": None}])
        with torch.no_grad():
            full = blender.ranker._full_predict(**{key: value for key, value in batch.items() if value is not None})
        results[f"logits_{number}"] = full["logits"][0].numpy()
        if number % RANK_EVERY:
            continue
        scores = blender.rank([case["source"]], [case["candidates"]], return_scores=True, batch_size=1)
        results[f"scores_{number}"] = scores[0]
        first, second = case["candidates"][:2]
        results[f"compare_{number}"] = blender.compare([case["source"]], [first], [second], return_logits=True)
    np.savez(results_path, **results)


if __name__ == "__main__":
    main()
