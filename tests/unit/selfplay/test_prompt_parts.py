"""Proves: held-out prompts are never trained on, parts are disjoint, and the same file and seed give the same parts."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.prompts import read_prompts
from megatron_sppo.selfplay.config import EvaluationConfig, RunConfig, ScoringConfig
from megatron_sppo.selfplay.prompt_parts import PromptParts, divide_prompts, refuse_uncheckable, write_prompts


def write_file(path: Path, *, num_train: int = 20, num_heldout: int = 5) -> Path:
    rows = [{"prompt_id": f"t{n}", "prompt": f"Train {n}?", "split": "train"} for n in range(num_train)]
    rows += [{"prompt_id": f"h{n}", "prompt": f"Held {n}?", "split": "heldout"} for n in range(num_heldout)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def divide(path: Path, *, heldout_prompts: int | None = None, **run: object) -> PromptParts:
    config = RunConfig(model=Path("m"), prompts=(path,), output=Path("o"), **run)
    return divide_prompts(config, EvaluationConfig(heldout_prompts=heldout_prompts))


def ids(prompts: tuple) -> set[str]:
    return {prompt.prompt_id for prompt in prompts}


def test_three_iterations_share_out_all_training_prompts_disjointly(tmp_path: Path) -> None:
    parts = divide(write_file(tmp_path / "p.jsonl"), iterations=3)
    assert sorted(len(part) for part in parts.iterations) == [6, 7, 7]
    assert set().union(*(ids(part) for part in parts.iterations)) == {f"t{n}" for n in range(20)}
    assert ids(parts.heldout) == {f"h{n}" for n in range(5)}


def test_all_gives_every_iteration_every_training_prompt(tmp_path: Path) -> None:
    parts = divide(write_file(tmp_path / "p.jsonl"), iterations=2, prompts_per_iteration="all")
    assert [ids(part) for part in parts.iterations] == [{f"t{n}" for n in range(20)}] * 2


def test_a_limit_shortens_each_part_and_keeps_them_disjoint(tmp_path: Path) -> None:
    parts = divide(write_file(tmp_path / "p.jsonl"), iterations=2, max_prompts_per_iteration=3).iterations
    assert [len(part) for part in parts] == [3, 3] and not ids(parts[0]) & ids(parts[1])


def test_the_seed_decides_the_parts(tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.jsonl")
    assert divide(path, seed=1) == divide(path, seed=1)
    assert divide(path, seed=1) != divide(path, seed=2)


def test_a_number_of_held_out_prompts_is_taken_from_any_row(tmp_path: Path) -> None:
    parts = divide(write_file(tmp_path / "p.jsonl", num_heldout=0), heldout_prompts=8, iterations=2)
    assert len(parts.heldout) == 8
    assert not ids(parts.heldout) & set().union(*(ids(part) for part in parts.iterations))
    assert sum(len(part) for part in parts.iterations) == 12


@pytest.mark.parametrize("count", [0, 8])
def test_rows_that_are_marked_are_never_trained_on_though_others_are_held_out(tmp_path: Path, count: int) -> None:
    parts = divide(write_file(tmp_path / "p.jsonl"), heldout_prompts=count, iterations=2)
    used = set().union(*(ids(part) for part in parts.iterations), ids(parts.heldout))
    assert used == {f"t{n}" for n in range(20)} and len(parts.heldout) == count
    assert parts.num_left_out == 5
    trained = divide(
        write_file(tmp_path / "p.jsonl"),
        heldout_prompts=2,
        iterations=1,
        train_split="heldout",
        heldout_split="heldout",
    )
    assert ids(trained.iterations[0]) | ids(trained.heldout) == {f"h{n}" for n in range(5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no rows with .*heldout.*--heldout-prompts 0"),
        ({"heldout_prompts": 20}, "heldout_prompts is 20, but .* has 20 prompts"),
        ({"heldout_prompts": 18, "iterations": 3}, "2 prompts to train on"),
    ],
)
def test_too_few_prompts_are_refused_with_the_remedy(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        divide(write_file(tmp_path / "p.jsonl", num_heldout=0), **changes)


def test_no_evaluation_needs_no_held_out_rows(tmp_path: Path) -> None:
    assert divide(write_file(tmp_path / "p.jsonl", num_heldout=0), heldout_prompts=0).heldout == ()


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    heldout = divide(write_file(tmp_path / "p.jsonl")).heldout
    write_prompts(tmp_path / "heldout.jsonl", heldout)
    assert read_prompts(tmp_path / "heldout.jsonl").prompts == heldout


def test_what_judges_check_by_travels_with_the_prompts(tmp_path: Path) -> None:
    row = {
        "prompt": "Write.",
        "split": "train",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
        "more": 1,
    }
    (tmp_path / "p.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({"prompt": "Held?", "split": "heldout"}) + "\n"
    )
    parts = divide(tmp_path / "p.jsonl", iterations=1, prompts_per_iteration="all")
    write_prompts(tmp_path / "part.jsonl", parts.iterations[0])
    (prompt,) = read_prompts(tmp_path / "part.jsonl").prompts
    assert prompt == parts.iterations[0][0]
    assert prompt.columns == {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def test_prompts_that_a_judge_cannot_check_are_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.jsonl")
    run = RunConfig(model=Path("m"), prompts=(path,), output=Path("o"))
    parts = divide(path)
    for judge, refused in (("verifiable:ifeval", True), ("verifiable:math", True), ("rules:concise", False)):
        config: Any = SimpleNamespace(run=run, scoring=ScoringConfig(judge=judge), eval_judge=judge)
        with pytest.raises(ConfigError, match="which no prompt of .*p.jsonl has") if refused else nullcontext():
            refuse_uncheckable(config, parts.heldout)
