"""Metrics by arithmetic, and metrics.jsonl across a kill."""

import json
from pathlib import Path

import pytest
import torch

from megatron_sppo.training.metrics import StepFiles, drift_per_token, response_metrics


def test_metrics_of_four_responses() -> None:
    """Chosen: rows 0, 1 (w > 1/2); rejected: row 2; row 3 is tied and counts as neither."""
    metrics = response_metrics(
        torch.tensor([2.0, -1.0, -3.0, 5.0], dtype=torch.float64),
        torch.tensor([-10.0, -20.0, -30.0, -40.0], dtype=torch.float64),
        win_rate_N=torch.tensor([0.9, 0.7, 0.2, 0.5]),
        target_N=torch.tensor([4.0, 2.0, -3.0, 0.0]),
        eta=10.0,
    )
    assert metrics["rewards/chosen"] == pytest.approx((0.2 - 0.1) / 2)
    assert metrics["rewards/rejected"] == pytest.approx(-0.3)
    assert metrics["rewards/margins"] == pytest.approx(0.05 + 0.3)
    assert metrics["rewards/accuracies"] == pytest.approx(2 / 3)
    assert metrics["logps/chosen"] == pytest.approx(-15)
    assert metrics["logps/rejected"] == pytest.approx(-30)
    assert metrics["sppo/log_ratio_mean"] == pytest.approx(3 / 4)
    assert metrics["sppo/residual_rms"] == pytest.approx(((4 + 9 + 0 + 25) / 4) ** 0.5)


def test_metrics_of_an_objective_of_pairs_are_trl_s() -> None:
    """Winner, loser, twice: both pairs' winners have the larger log-ratio, though both of the first pair fell.

    The second pair's win rates lie on one side of 1/2: which of a pair is chosen is not read off them.
    """
    metrics = response_metrics(
        torch.tensor([-1.0, -3.0, 5.0, 4.0], dtype=torch.float64),
        torch.tensor([-10.0, -20.0, -30.0, -40.0], dtype=torch.float64),
        win_rate_N=torch.tensor([0.9, 0.2, 0.8, 0.7]),
        target_N=None,
        eta=10.0,
        couples_pairs=True,
    )
    assert metrics["rewards/accuracies"] == 1
    assert metrics["rewards/chosen"] == pytest.approx((-0.1 + 0.5) / 2)
    assert metrics["rewards/rejected"] == pytest.approx((-0.3 + 0.4) / 2)
    assert metrics["rewards/margins"] == pytest.approx(0.2 - 0.05)
    assert (metrics["logps/chosen"], metrics["logps/rejected"]) == (pytest.approx(-20), pytest.approx(-30))


def test_drift_is_per_response_token() -> None:
    assert drift_per_token(torch.tensor([1.0, -3.0]), torch.tensor([6, 2])) == pytest.approx(0.5)


def test_a_resumed_run_cuts_off_the_steps_that_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    (tmp_path / "responses.jsonl").write_text('{"step": 2, "log_ratio": 1.0}\n{"step": 3, "log_ratio": 1.0}\n')
    files = StepFiles(tmp_path, 3)
    files.write(3, {"loss": 2.0}, {"log_ratio": torch.tensor([2.0, 3.0])})
    files.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 2.0},
    ]
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [(line["step"], line["log_ratio"]) for line in lines] == [(2, 1.0), (3, 2.0), (3, 3.0)]


@pytest.mark.parametrize("num_redone", [0, 1, 2500, 5000])
def test_a_resumed_run_reads_no_more_of_its_lines_than_it_cuts_off(tmp_path: Path, monkeypatch, num_redone) -> None:
    """5,000 lines of about 60 bytes, ten a step: the last ones are cut off, one more is read."""
    path, lines = tmp_path / "responses.jsonl", [json.dumps({"step": 1 + n // 10, "x": "y" * 40}) for n in range(5000)]
    path.write_text("\n".join(lines) + "\n")
    kept = 5000 - num_redone // 10 * 10
    looked_at = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: looked_at.append(line) or loads(line))
    StepFiles(tmp_path, 1 + kept // 10).close()
    assert path.read_text().splitlines() == lines[:kept]
    assert len(looked_at) <= 5000 - kept + 1


def test_lines_longer_than_a_block_are_kept_whole_and_one_without_its_end_goes(tmp_path: Path) -> None:
    path, long = tmp_path / "metrics.jsonl", json.dumps({"step": 1, "x": "y" * 200_000})
    path.write_text(f"{long}\n{long}\n" + '{"step": 1}')
    StepFiles(tmp_path, 2).close()
    assert path.read_text() == f"{long}\n{long}\n"
