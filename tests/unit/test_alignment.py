"""Proves what the experiment on a language model declares: its settings, what runs share, what counts as a result."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import alignment

CONFIG = alignment.AlignmentConfig(work=Path("w"), model=Path("m"), prompts=Path("p.jsonl"))


def test_settings_are_those_that_were_declared() -> None:
    settings = alignment.settings_of(CONFIG, alignment.Piece(entry="dpo", seed=3, lr=2e-5, eta=30.0))
    assert settings["training"]["objective"] == "dpo" and settings["training"]["beta"] == 1 / 30
    many = alignment.settings_of(CONFIG, alignment.Piece(entry="sppo_many", seed=3, lr=2e-5, eta=30.0))["run"]
    assert (many["iterations"], many["max_prompts_per_iteration"]) == (9, 21)
    tuning = alignment.Piece(entry="sppo", seed=alignment.TUNING_SEED, lr=2e-5, eta=3.0, tunes=True)
    assert alignment.settings_of(CONFIG, tuning)["run"]["prompts"] != [str(CONFIG.prompts)]


def record(entry: str, seed: int, values: list[float], *, start: float = 0.25) -> dict[str, Any]:
    """Make a finished run whose held-out prompts have these strict accuracies, and the start model's `start`."""
    prompts = [f"h{n}" for n in range(len(values))]
    accuracy = {name: {"prompt_level": v, "instruction_level": v} for name, v in zip(prompts, values, strict=True)}
    base = {name: {"prompt_level": start, "instruction_level": start} for name in prompts}
    return {"entry": entry, "seed": seed, "iterations": [{"accuracy": accuracy}], "base_accuracy": base}


def compared(**by_entry: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    rows = alignment.comparisons(by_entry, 0.05)
    return {f"{row['entry']}/{row['against']}": row for row in rows}


def test_a_difference_is_shown_if_it_is_significant_beyond_the_floor_and_of_one_sign_in_every_seed() -> None:
    """Twenty prompts, two seeds: 0.5 against 0.25 on all of them; one seed below the start; all within the floor."""
    high, low = [0.5] * 20, [0.2] * 20
    found = compared(
        sppo=[record("sppo", seed, high) for seed in (0, 1)], dpo=[record("dpo", 0, high), record("dpo", 1, low)]
    )
    row = found["sppo/start model"]
    assert row["shown"] and row["difference"] == pytest.approx(0.25) and row["interval"] == pytest.approx((0.25, 0.25))
    assert found["dpo/start model"]["p_holm"] < 0.05 and not found["dpo/start model"]["shown"]
    assert found["dpo/sppo"]["by_seed"] == pytest.approx([0, -0.3])
    small = compared(sppo=[record("sppo", seed, [0.29] * 20) for seed in (0, 1)])["sppo/start model"]
    assert small["p"] < 0.001 and not small["shown"]


def test_the_floor_is_the_largest_difference_between_the_start_model_s_own_seeds() -> None:
    records = [record("sppo", seed, [1.0], start=start) for seed, start in enumerate((0.2, 0.26, 0.23))]
    assert alignment.floors(CONFIG, records)["largest_difference"] == pytest.approx(0.06)


def donor(work: Path, piece: alignment.Piece, config: alignment.AlignmentConfig) -> Path:
    """Write what a run has behind its first dataset."""
    run_dir = work / "runs" / piece.name
    for name in (
        "base/model.bin",
        "base_eval/rollouts/a",
        "iter_1/rollouts/a",
        "iter_1/dataset/a",
        "iter_1/dataset/reference.bin",
    ):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(name)
    run = json.loads(json.dumps(alignment.settings_of(config, piece)["run"]))
    stages = {name: {"status": "done"} for name in (*alignment.SHARED, "iter_1-train")}
    (run_dir / "state.json").write_text(json.dumps({"config": {"run": run}, "stages": stages, "finished": True}))
    return run_dir


def test_a_run_takes_over_the_first_answers_of_another_with_its_seed_and_nothing_that_an_objective_decided(
    tmp_path: Path,
) -> None:
    config = alignment.AlignmentConfig(work=tmp_path, model=Path("m"), prompts=Path("p.jsonl"))
    first = alignment.Piece(entry="sppo", seed=1, lr=1e-5, eta=3.0)
    donor(tmp_path, first, config)
    for seed, shares in ((1, True), (10, False)):
        piece = alignment.Piece(entry="dpo", seed=seed, lr=1e-5, eta=3.0)
        alignment._share(config, piece)
        run_dir = tmp_path / "runs" / piece.name
        assert run_dir.exists() == shares
    run_dir = tmp_path / "runs" / "dpo-seed1"
    state = json.loads((run_dir / "state.json").read_text())
    assert set(state["stages"]) == set(alignment.SHARED) and state["config"] is None and not state["finished"]
    assert (run_dir / "iter_1/dataset/a").samefile(tmp_path / "runs/sppo-seed1/iter_1/dataset/a")
    assert not (run_dir / "iter_1/dataset/reference.bin").exists()
