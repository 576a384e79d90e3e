"""llm-blender 0.0.2 as a child process, in an environment of its own: loaded once, asked to rank as often as wanted.

Its environment:
    python3.11 -m venv PEER && PEER/bin/pip install torch==2.13.0 transformers==5.19.0 llm-blender==0.0.2 \\
        sentencepiece protobuf

Usage: PEER/bin/python llm_blender_peer.py CHECKPOINT CASES.json cpu|cuda. Then a line with a batch size comes in, and
a line of JSON {"seconds", "scores"} goes out; the first line out is {"versions"}.
"""

import contextlib
import json
import platform
import sys
import time
from importlib import metadata

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


def load_blender(checkpoint: str, *, device: str) -> llm_blender.Blender:
    """Load a PairRM checkpoint in its native format -> Blender, in eval mode."""
    blender = llm_blender.Blender(blender_config=llm_blender.BlenderConfig(device=device, use_tqdm=False))
    blender.loadranker(checkpoint, device=device)
    return blender


def main() -> None:
    """Rank the cases once for every line of standard input."""
    checkpoint, cases_path, device = sys.argv[1:]
    with open(cases_path, encoding="utf-8") as file:
        cases = json.load(file)
    # llm-blender prints while it loads: standard output is for our lines.
    with contextlib.redirect_stdout(sys.stderr):
        blender = load_blender(checkpoint, device=device)
    packages = ("llm-blender", "torch", "transformers")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    print(json.dumps({"versions": versions}), flush=True)
    clock = time.process_time if device == "cpu" else time.perf_counter
    for line in sys.stdin:
        begin = clock()
        scores = blender.rank(
            [case["source"] for case in cases],
            [case["candidates"] for case in cases],
            return_scores=True,
            batch_size=int(line),
        )
        if device != "cpu":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": clock() - begin, "scores": scores.tolist()}), flush=True)


if __name__ == "__main__":
    main()
