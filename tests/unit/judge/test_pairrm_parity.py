"""PairRM against llm-blender 0.0.2's own model on the same files: raw logits, `rank` and `compare` of 200 prompts.

Proves that input format, truncation, network and both orders are llm-blender's. Weights are random: it says nothing
about the published checkpoint's taste. llm-blender cannot live beside our libraries, so that its numbers are recorded:
peer/ holds the checkpoint, the prompts and what llm-blender made of them. To record them anew:

    python -m tests.unit.judge.test_pairrm_parity PEER/bin/python      (benchmarks/llm_blender_peer.py describes PEER)
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.judge.pairrm.judge import PairRMJudge
from tests.unit.judge.groups import group_of, random_text
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm

PEER = Path(__file__).with_name("peer")
NUM_CASES = 200
TOLERANCE = 1e-5


def _cases() -> list[dict[str, object]]:
    """Prompts with K = 2..8 responses; one pair of responses and one source are longer than PairRM's limits."""
    rng = random.Random(11)
    cases = []
    for number in range(NUM_CASES):
        texts = [random_text(rng, 1, 12) for _ in range(2 + number % 7)]
        source = random_text(rng, 1, 12)
        if number == 7:
            texts = [random_text(rng, 900, 1000), random_text(rng, 900, 1000)]
        if number == 14:
            source = random_text(rng, 900, 1000)
        if number % 9 == 0:
            texts[0] += " [SEP] line\nbreak\t\u00e9\u6f22 "
        if number % 29 == 3:
            texts[-1] = texts[0]
        cases.append({"source": source, "candidates": texts})
    return cases


def record(peer_python: str) -> None:
    """Make the checkpoint and the cases, let llm-blender judge them, and keep all three in peer/."""
    shutil.rmtree(PEER, ignore_errors=True)
    PEER.mkdir()
    (PEER / "cases.json").write_text(json.dumps(_cases()), encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        native, _ = make_tiny_pairrm(root)
        # Half the bytes, and exact in float32.
        weights = native / "model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
        command = [peer_python, "-m", "tests.unit.judge.llm_blender_logits", native]
        subprocess.run([*command, PEER / "cases.json", PEER / "llm_blender.npz"], check=True)
        shutil.copytree(native, PEER / "PairRM")
        (PEER / "base").mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(root / "base" / name, PEER / "base" / name)
    config = json.loads((PEER / "PairRM" / "config.json").read_text())
    (PEER / "PairRM" / "config.json").write_text(json.dumps({**config, "model_name": "base"}))


def _checkpoint(root: Path) -> Path:
    """Copy the recorded checkpoint to where its config can name its base by an absolute path -> its directory."""
    shutil.copytree(PEER, root, dirs_exist_ok=True)
    path = root / "PairRM" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_name": str(root / "base")}))
    return root / "PairRM"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> PairRMJudge:
    return PairRMJudge(str(_checkpoint(tmp_path_factory.mktemp("peer"))), reads="message", device="cpu")


def test_logits_rank_and_compare_are_llm_blenders(judge: PairRMJudge, record_property) -> None:
    cases, peer = json.loads((PEER / "cases.json").read_text(encoding="utf-8")), np.load(PEER / "llm_blender.npz")
    assert json.loads(str(peer["versions"]))["llm-blender"] == "0.0.2"
    assert len(cases) == NUM_CASES and {len(case["candidates"]) for case in cases} == set(range(2, 9))
    ours = judge.judge_logits([group_of(case["source"], case["candidates"]) for case in cases])
    assert judge.counts["truncated_candidates"] == 2 and judge.counts["truncated_sources"] == 1
    assert np.concatenate([matrix.ravel() for matrix in ours]).std() > 0.1, "weights that see no difference show none"
    logits = np.split(peer["logits"], np.cumsum([matrix.size for matrix in ours])[:-1])
    scores = np.split(peer["scores"], np.cumsum([len(matrix) for matrix in ours])[:-1])
    differences = {"logits": 0.0, "rank": 0.0, "compare": 0.0}
    for case, matrix, peer_logits, peer_scores, peer_compare in zip(
        cases, ours, logits, scores, peer["compare"], strict=True
    ):
        # Identical responses: ours is 0 by decree, llm-blender's is its position bias, the same in both orders.
        texts = np.array(case["candidates"])
        same = texts[:, None] == texts[None, :]
        assert (matrix[same] == 0).all()
        difference = np.abs(matrix - peer_logits.reshape(matrix.shape))[~same].max(initial=0)
        differences["logits"] = max(differences["logits"], difference)
        # rank: s_i = mean over all K of (L_ij - L_ji); compare: s_0 - s_1 of the pair alone, both orders' sum.
        rank = (matrix - matrix.T).mean(axis=1)
        differences["rank"] = max(differences["rank"], np.abs(rank - peer_scores).max())
        differences["compare"] = max(differences["compare"], abs(matrix[0, 1] - matrix[1, 0] - peer_compare))
    for name, difference in differences.items():
        record_property(f"largest difference, {name}", float(difference))
    assert max(differences.values()) < TOLERANCE, differences


def test_the_recorded_cases_are_those_that_the_script_makes() -> None:
    assert json.loads((PEER / "cases.json").read_text(encoding="utf-8")) == _cases()


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(sys.argv[1])
