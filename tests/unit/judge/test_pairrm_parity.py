"""PairRM against llm-blender 0.0.2's own model on the same files: raw logits, `rank` and `compare`.

Proves that input format, truncation, network and both orders are llm-blender's. Weights are random: it says nothing
about the published checkpoint's taste. llm-blender needs older libraries than ours, so it runs in an interpreter of its
own: SPPO_LLM_BLENDER_PYTHON names one that has `llm-blender==0.0.2`.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sppo.judge.pairrm import PairRMJudge
from tests.unit.judge.groups import group_of, random_text
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm

PEER_PYTHON = os.environ.get("SPPO_LLM_BLENDER_PYTHON", sys.executable)
TOLERANCE = 1e-5


def _peer_is_there() -> bool:
    command = [
        PEER_PYTHON,
        "-c",
        "import importlib.util, sys; sys.exit(importlib.util.find_spec('llm_blender') is None)",
    ]
    return Path(PEER_PYTHON).exists() and subprocess.run(command, check=False).returncode == 0


pytestmark = pytest.mark.skipif(
    not _peer_is_there(), reason="llm_blender is not importable: set SPPO_LLM_BLENDER_PYTHON to a Python that has it"
)


def _cases(num_cases: int) -> list[dict[str, object]]:
    """Prompts with K = 2..8 responses; one pair of responses and one source are longer than PairRM's limits."""
    rng = random.Random(11)
    cases = []
    for number in range(num_cases):
        texts = [random_text(rng, 1, 12) for _ in range(2 + number % 7)]
        source = random_text(rng, 1, 12)
        if number == 7:
            texts = [random_text(rng, 900, 1000), random_text(rng, 900, 1000)]
        if number == 14:
            source = random_text(rng, 900, 1000)
        if number % 9 == 0:
            texts[0] += " [SEP] line\nbreak\t\u00e9\u6f22 "
        cases.append({"source": source, "candidates": texts})
    return cases


@pytest.mark.parametrize("num_cases", [21, pytest.param(200, marks=pytest.mark.slow)])
def test_logits_rank_and_compare_are_llm_blenders(tmp_path: Path, num_cases: int, record_property) -> None:
    native, hf = make_tiny_pairrm(tmp_path)
    cases = _cases(num_cases)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("llm_blender_logits.py")
    subprocess.run(
        [PEER_PYTHON, script, native, tmp_path / "cases.json", tmp_path / "peer.npz"],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    peer = np.load(tmp_path / "peer.npz")
    groups = [group_of(case["source"], case["candidates"]) for case in cases]
    for checkpoint in (native, hf):
        judge = PairRMJudge(str(checkpoint), preset="paper", device="cpu")
        ours = judge.judge_logits(groups)
        assert judge.counts["truncated_candidates"] == 2 and judge.counts["truncated_sources"] == 1
        spread = np.std(np.concatenate([matrix.ravel() for matrix in ours]))
        assert spread > 0.1, "random weights that judge everything alike would prove nothing"
        differences = []
        for number, (case, matrix) in enumerate(zip(cases, ours, strict=True)):
            # Identical responses: ours is 0 by decree, llm-blender's is its position bias, the same in both orders.
            texts = np.array(case["candidates"])
            same = texts[:, None] == texts[None, :]
            assert (matrix[same] == 0).all()
            differences.append(np.abs(matrix - peer[f"logits_{number}"])[~same].max(initial=0))
            if f"scores_{number}" not in peer:
                continue
            # rank: s_i = mean over all K of (L_ij - L_ji); compare: s_0 - s_1 of the pair alone, both orders' sum.
            scores = (matrix - matrix.T).mean(axis=1)
            differences.append(np.abs(scores - peer[f"scores_{number}"]).max())
            differences.append(abs(matrix[0, 1] - matrix[1, 0] - peer[f"compare_{number}"][0]))
        record_property(f"largest difference, {checkpoint.name}", float(max(differences)))
        assert max(differences) < TOLERANCE
