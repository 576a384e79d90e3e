"""Proves that self-play gives objectives their further references: onpo's auxiliary policy, in two real iterations.

A tiny random Llama and a sampler that needs no model; which checkpoint each objective gets is in tests/unit/selfplay.
"""

import json
from pathlib import Path

from tests.e2e.test_self_play import inputs, self_play  # noqa: F401 (a fixture)


def test_onpo_takes_each_step_from_the_auxiliary_policy_that_the_iteration_trained(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The data keep log pi of pi_t, of the auxiliary before and of the new one; in the first iteration two are one."""
    run_dir = tmp_path / "run"
    brief = ("--inspected-prompts", "0", "--heldout-prompts", "0", "--keep-last", "1")
    outcome = self_play(inputs, run_dir, *brief, "--training", "objective=onpo", "micro_batch_size=2")
    assert outcome.returncode == 0, outcome.stderr
    stages = json.loads((run_dir / "state.json").read_text())["stages"]
    assert [name for name in stages if "train" in name] == [
        f"iter_{iteration}-{name}" for iteration in (1, 2) for name in ("train-auxiliary", "train")
    ]
    for iteration, number in ((1, 2), (2, 3)):
        dataset = run_dir / f"iter_{iteration}" / "dataset"
        found = [json.loads(path.read_text())["fingerprint"] for path in dataset.glob("reference.*json")]
        assert len({names["weights_hash"] for names in found}) == number
        for name in ("auxiliary", "checkpoint"):
            assert bool(list((run_dir / f"iter_{iteration}" / name).glob("iter_*"))) == (iteration == 2)
