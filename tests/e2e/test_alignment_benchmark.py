"""Proves that the experiment on a language model runs, shares, goes on and compares: its short form on a tiny Llama.

The sampler reads no weights and the judge is a rule, so no number means anything here; what they mean is declared in
benchmarks/alignment.py.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.forked import run_forked
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alignment")
    tiny_llama(directory / "model")
    rows = [{"prompt_id": f"t{n}", "prompt": f"What is {n}?", "split": "train"} for n in range(8)]
    rows += [{"prompt_id": f"h{n}", "prompt": f"Is {n} held out?", "split": "heldout"} for n in range(3)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def run(work: Path, *flags: str) -> subprocess.CompletedProcess:
    sampler = f"{sys.executable} {ROOT / 'tests' / 'e2e' / 'fake_rollouts.py'}"
    places = ["--work", work / "runs", "--model", work / "model", "--prompts", work / "prompts.jsonl"]
    sizes = "--judge rules:concise --seeds 1 --iterations 1 --prompts-per-iteration 4 --max-tokens 16 --num-responses 3"
    fixed = f"{sizes} --params-dtype float32 --learning-rates 1e-3 --etas 3 --entries sppo dpo"
    more = ["--rollout-command", sampler, "--output", work / "smollm2.json"]
    return run_forked("benchmarks.alignment", [*places, *fixed.split(), *more, *flags])


def test_the_short_form_runs_in_pieces_and_both_entries_begin_with_the_same_answers(work: Path) -> None:
    begun = run(work, "--minutes", "0.001")
    assert begun.returncode == 0 and "time is up; the same command goes on" in begun.stdout, begun.stderr
    done = run(work)
    assert done.returncode == 0, done.stderr[-2000:] + "".join(p.read_text() for p in work.rglob("logs/*.log"))
    assert "complete" in done.stdout
    result = json.loads((work / "smollm2.json").read_text())
    assert result["complete"] and [one["entry"] for one in result["runs"]] == ["sppo", "dpo"]
    assert len({one["iterations"][0]["dataset_sha256"] for one in result["runs"]}) == 1
    assert [(row["entry"], row["against"]) for row in result["comparisons"]] == [
        ("sppo", "start model"),
        ("dpo", "start model"),
        ("dpo", "sppo"),
    ]
    with np.load(work / "smollm2_matrices.npz") as matrices:
        assert {name: values.shape for name, values in matrices.items()} == {
            f"{name}-seed0/iter_1": (4, 3, 3) for name in ("sppo", "dpo")
        }
    state = json.loads((work / "runs/runs/dpo-seed0/state.json").read_text())
    assert state["stages"]["iter_1-rollouts"]["command"] != state["stages"]["iter_1-train"]["command"]
    assert str(work / "runs/runs/sppo-seed0") in " ".join(state["stages"]["iter_1-rollouts"]["command"])
    assert not list((work / "runs/runs").glob("*/iter_1/checkpoint"))
    page = page_of(work)
    assert "| dpo | sppo |" in page and "| sppo, 0.001, 3 |" in page and "Not all runs" not in page


def page_of(results: Path) -> str:
    """Write the part of docs/alignment.md that is made from smollm2.json there."""
    module = runpy.run_path(str(ROOT / "docs" / "alignment.py"))
    module["language_model"].__globals__["RESULTS"] = results
    return module["language_model"]()
