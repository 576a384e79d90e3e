"""Proves: a report reads no more than it shows, and its figures stay bounded however long the run was.

Counted are files and points; what the page says is tests/unit/report/test_page.py's.
"""

import base64
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_sppo.report import data as report_data
from megatron_sppo.report import plots
from megatron_sppo.report.data import IterationData, StepMetrics, read_metrics, read_run
from megatron_sppo.report.page import write_report
from megatron_sppo.rollout.records import RolloutManifest, write_manifest, write_shard
from tests.unit.selfplay.synthetic import group, write_run


def write_shards(directory: Path, prompt_ids: list[str], *, rows_per_shard: int) -> Path:
    entries = []
    for number, first in enumerate(range(0, len(prompt_ids), rows_per_shard)):
        names = prompt_ids[first : first + rows_per_shard]
        entries.append(write_shard(directory, number, [group(name, [f"An answer to {name}."]) for name in names]))
    manifest = RolloutManifest(
        schema_version=1,
        model="tiny",
        model_hash=None,
        tokenizer_hash=None,
        chat_template_hash=None,
        sampling={"num_responses": 1},
        num_prompts=len(prompt_ids),
        shards=tuple(entries),
        quarantined=(),
    )
    write_manifest(directory, manifest)
    return directory


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Shards that were verified and parsed."""
    read: Counter[str] = Counter()

    def counting(directory, entry, **limits):
        read[entry.file] += 1
        return report_data_read_shard(directory, entry, **limits)

    report_data_read_shard = report_data.read_shard
    monkeypatch.setattr(report_data, "read_shard", counting)
    return read


def test_shards_without_a_wanted_prompt_are_not_parsed_and_those_behind_the_last_not_opened(
    tmp_path: Path, verified: Counter
) -> None:
    directory = write_shards(tmp_path / "r", [f"p{number:03d}" for number in range(100)], rows_per_shard=10)
    for number in (7, 8, 9):
        (directory / f"shard-{number:05d}.jsonl").unlink()
    found = report_data._groups(directory, {"p025", "p061", "p067"})
    assert {name: one.responses[0].text for name, one in found.items()} == {
        name: f"An answer to {name}." for name in ("p025", "p061", "p067")
    }
    assert verified == {"shard-00002.jsonl": 1, "shard-00006.jsonl": 1}


@pytest.mark.parametrize("name", ["a/b", "\u00e9", 'say "x"', "a b", "tab\t"])
def test_prompts_are_found_however_their_id_is_spelled(tmp_path: Path, name: str) -> None:
    directory = write_shards(tmp_path / "r", ["p0", name, "p2"], rows_per_shard=1)
    shard = directory / "shard-00001.jsonl"
    assert list(report_data._groups(directory, {name})) == [name]
    assert json.loads(shard.read_text())["prompt_id"] == name


def test_the_training_rollouts_are_not_needed(tmp_path: Path) -> None:
    """Prompts stand in the dataset as well: a run whose rollouts were removed has the same page."""
    run_dir = write_run(tmp_path / "run")
    page = write_report(run_dir).read_bytes()
    assert page.count(b"Training 0?") == 1
    for iteration in (1, 2):
        shutil.rmtree(run_dir / f"iter_{iteration}" / "rollouts")
    assert write_report(run_dir).read_bytes() == page


def test_last_visits_equal_a_dictionary_s(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    lines = [
        {
            "step": step,
            "group": int(g),
            "response": int(k),
            "log_ratio": float(r),
            **({"target": float(t)} if t else {}),
        }
        for step, (g, k, r, t) in enumerate(
            zip(*rng.integers(0, 6, (2, 200)), rng.normal(size=200), rng.integers(0, 3, 200), strict=True)
        )
    ]
    run_dir = write_run(tmp_path / "run", num_iterations=1)
    path = run_dir / "iter_1" / "checkpoint" / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = {(line["group"], line["response"]): line for line in lines if "target" in line}
    found = read_run(run_dir).iterations[0]
    assert found.steps.tolist() == [line["step"] for line in last.values()]
    assert found.targets.tolist() == [line["target"] for line in last.values()]
    assert found.log_ratios.tolist() == [line["log_ratio"] for line in last.values()]


def test_metrics_are_columns_and_what_a_step_lacks_is_a_gap(tmp_path: Path) -> None:
    rows = [
        {"iteration": 1, "loss": 2, "gpu/power_watts": 600.0, "gpu/throttled": 1.0},
        {"iteration": 1, "loss": None},
        {"iteration": 2, "loss": 1.5, "gpu/power_watts": 610},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.losses.tolist() == [2.0, 1.5] and metrics.iterations.tolist() == [1, 2]
    assert list(metrics.machine) == ["gpu/power_watts"]
    np.testing.assert_array_equal(metrics.machine["gpu/power_watts"], [600.0, np.nan, 610.0])
    assert metrics.throttled.tolist() == [True, False, False]
    assert read_metrics(tmp_path / "absent.jsonl").losses.size == 0


def test_steps_that_were_left_out_are_counted_over_the_iterations(tmp_path: Path) -> None:
    """Each training counts its own: 2 in the first iteration, 1 in the second."""
    counts = [(1, 0), (1, 1), (1, 2), (1, 2), (2, 0), (2, 1)]
    rows = [{"iteration": iteration, "step": 1, "sppo/skipped_steps": number} for iteration, number in counts]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(tmp_path / "metrics.jsonl").num_skipped == 3


def step_metrics(num_steps: int) -> StepMetrics:
    rng = np.random.default_rng(0)
    return StepMetrics(
        losses=rng.normal(size=num_steps) ** 2,
        iterations=np.ones(num_steps, dtype=np.int64),
        machine={"gpu/power_watts": rng.normal(600, 20, num_steps)},
        throttled=np.ones(num_steps, dtype=bool),
    )


@pytest.mark.parametrize("figure", [plots.loss_figure, plots.machine_figure])
def test_a_figure_of_a_hundred_times_the_steps_is_no_larger(figure) -> None:
    size, longer = (len(base64.b64decode(figure(step_metrics(n)).partition(",")[2])) for n in (2_000, 200_000))
    assert longer < 1.3 * size


def test_a_thinned_line_keeps_its_spikes_and_its_order() -> None:
    y = np.sin(np.arange(50_000) / 900)
    y[31_234], y[77], y[40_000:40_100] = 9.0, -9.0, np.nan
    x, kept = plots._thinned(np.arange(len(y)), y)
    assert len(x) <= 2_000 and (np.diff(x) > 0).all()
    assert np.array_equal(y[x], kept, equal_nan=True)
    assert 31_234 in x and 77 in x
    few = np.arange(2_000.0)
    assert plots._thinned(few, few)[0] is few


def test_of_very_many_responses_the_outermost_are_drawn() -> None:
    rng = np.random.default_rng(1)
    targets, log_ratios = rng.normal(size=(2, 90_000))
    targets[12_345], log_ratios[54_321] = 50.0, -50.0
    data = IterationData(
        iteration=1,
        summary={},
        targets=targets,
        log_ratios=log_ratios,
        steps=np.arange(90_000),
        diagnostics={},
        preferences=(),
    )
    drawn = plots._drawn(data)
    assert 12_345 in drawn and 54_321 in drawn
    assert len(drawn) <= 20_004 and (np.diff(drawn) > 0).all()
