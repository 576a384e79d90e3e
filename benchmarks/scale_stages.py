"""The stages that `benchmarks.scale` measures: what each needs, and one run of it.

A place is a directory for one size. Whatever a stage reads is made there first, uncounted, by the stages before it.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.instruments import Instruments
from benchmarks.scale_inputs import (
    NUM_RESPONSES,
    FakeJudge,
    FakeSampler,
    SlotEngine,
    write_model,
    write_prompts,
)
from benchmarks.scale_steps import (
    Run,
    Stage,
    collation,
    index,
    metrics,
    metrics_resumed,
    planning,
    reference,
    write_steps,
)
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.json_files import write_json
from megatron_sppo.judge import evaluation, workers
from megatron_sppo.judge import score as scoring
from megatron_sppo.judge.config import EvaluateConfig, ScoreConfig
from megatron_sppo.report.page import write_report
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.rollout.generate import generate_rollouts
from megatron_sppo.rollout.prompts import PromptRows
from megatron_sppo.rollout.sampler import Shard
from megatron_sppo.rollout.vllm_engine import RequestStream


def rollouts(run: Run) -> dict[str, float]:
    """Write rollouts from prompts, by a sampler that answers at once."""
    config = _job(run)
    sampler = FakeSampler(tokens=run.tokens)
    sampler.take = run.costs.leave_out(sampler.take)  # type: ignore[method-assign]
    with run.costs:
        generate_rollouts(config, make_sampler=lambda *_: sampler)
    return {}


def rollouts_again(run: Run) -> dict[str, float]:
    """Give the same command again, which finds nothing to do."""
    with run.costs:
        generate_rollouts(_job(run), make_sampler=_no_sampler)
    return {}


def _no_sampler(*_: object) -> FakeSampler:
    raise AssertionError("all shards are finished")


def _job(run: Run) -> GenerateConfig:
    model, prompts = run.place / "model", run.place / "prompts.jsonl"
    if not model.exists():
        write_model(model)
    if not prompts.exists():
        write_prompts(prompts, run.size)
    return GenerateConfig(
        model=model,
        prompts=prompts,
        output=run.place / "rollouts",
        num_responses=NUM_RESPONSES,
        max_tokens=max(run.tokens + 1, 16),
        shard_size=run.shard_size,
    )


def prompts(run: Run) -> dict[str, float]:
    """Read prompts."""
    config = _job(run)
    with run.costs:
        for _ in PromptRows(config.prompts):
            pass
    return {}


def decoding(run: Run) -> dict[str, float]:
    """Send shards through an engine of 256 slots, and count its steps: as they come, drained after each, and as one."""
    steps, costs = {}, run.costs
    for name, shard_size, drains in (
        ("steps", run.shard_size, False),
        ("steps_drained", run.shard_size, True),
        ("steps_of_one_shard", run.size, True),
    ):
        engine = SlotEngine()
        shards = [
            Shard(index=index, seed=0, prompts=range(min(shard_size, run.size - start)))  # type: ignore[arg-type]
            for index, start in enumerate(range(0, run.size, shard_size))
        ]
        stream = RequestStream(engine, one_at_a_time=drains)
        with patch("megatron_sppo.rollout.vllm_engine.prompt_seed", lambda *_: 0), costs:
            for _ in stream.answer(iter(shards), lambda *_: (NUM_RESPONSES, None), lambda *_: None):
                pass
        steps[name], costs = float(engine.num_steps), Instruments()
    return steps


def score(run: Run) -> dict[str, float]:
    """Score the rollouts by a judge that answers at once: intake, score files, merge, diagnostics."""
    with _fake_judge(run.costs), run.costs:
        scoring.score(_scoring(run))
    return {}


def merge(run: Run) -> dict[str, float]:
    """Make the dataset of the finished score files, which one rank does while the others are done."""
    original = scoring.merge_scores

    def measured(*arguments: Any, **settings: Any) -> Any:
        with run.costs:
            return original(*arguments, **settings)

    config = replace(_scoring(run), output=run.place / "merged")
    with _fake_judge(Instruments()), patch.object(scoring, "merge_scores", measured):
        scoring.score(config)
    return {}


def score_again(run: Run) -> dict[str, float]:
    """Give the same command again, which finds nothing to judge."""
    with _fake_judge(run.costs), run.costs:
        scoring.score(_scoring(run))
    return {}


def rebuild(run: Run) -> dict[str, float]:
    """Rebuild the dataset's targets under another selection: --from-dataset."""
    source = run.place / "dataset"
    config = ScoreConfig(output=run.place / "rebuilt", from_dataset=source, selection="extremes")
    with run.costs:
        scoring.rebuild(config, source)
    return {}


def _scoring(run: Run) -> ScoreConfig:
    return ScoreConfig(rollouts=run.place / "rollouts", judge="rules:concise", output=run.place / "dataset")


@contextmanager
def _fake_judge(costs: Instruments) -> Iterator[None]:
    judge = FakeJudge()
    judge.judge_logits = costs.leave_out(judge.judge_logits)  # type: ignore[method-assign]
    with patch.object(workers, "load_judge", lambda *_, **__: judge):
        yield


def dataset(run: Run) -> dict[str, float]:
    """Open and verify the dataset, as the first rank does."""
    with run.costs:
        PreferenceDataset(run.place / "dataset")
    return {}


def dataset_of_others(run: Run) -> dict[str, float]:
    """Open the dataset as every other rank does."""
    with run.costs:
        PreferenceDataset(run.place / "dataset", verify_contents=False)
    return {}


def evaluate(run: Run) -> dict[str, float]:
    """Compare two policies' answers to all prompts: here the same answers twice."""
    answers = run.place / "rollouts"
    config = EvaluateConfig(
        policy=answers,
        base=answers,
        previous=answers,
        judge="rules:concise",
        output=run.place / "result.json",
        allow_no_signal=True,
        bootstrap_resamples=200,
    )
    with _fake_judge(run.costs), run.costs:
        evaluation.evaluate(config)
    return {}


def report(run: Run) -> dict[str, float]:
    """Write the page of a run of one iteration, evaluated on a tenth of its prompts."""
    directory = run.place / "run"
    if not directory.exists():
        _make_run(run, directory)
    with run.costs:
        write_report(directory)
    return {}


def _make_run(run: Run, directory: Path) -> None:
    checkpoint, held_out = directory / "iter_1/checkpoint", directory / "iter_1/eval/rollouts"
    checkpoint.mkdir(parents=True)
    for name, source in (("rollouts", "rollouts"), ("dataset", "merged")):
        os.symlink((run.place / source).resolve(), directory / "iter_1" / name)
    number = max(run.size // 10, 2)
    job = replace(_job(run), output=held_out, limit=number)
    sampler = FakeSampler(tokens=run.tokens)
    generate_rollouts(job, make_sampler=lambda *_: sampler)
    (directory / "base_eval").mkdir()
    os.symlink(held_out.resolve(), directory / "base_eval/rollouts")
    rate = {"mean": 0.5, "low": 0.4, "high": 0.6, "num_prompts": number}
    rows = [{"prompt_id": f"prompt-{row}", "vs_base": row / number, "vs_previous": 0.5} for row in range(number)]
    result = {"judge": "rules:concise", "win_rate_vs_base": rate, "win_rate_vs_previous": rate, "prompts": rows}
    write_json(directory / "iter_1/eval/result.json", result | {"mean_response_tokens": float(run.tokens)})
    entry = {"iteration": 1, "judge": "rules:concise", "win_rate_vs_base": rate, "win_rate_vs_previous": rate}
    entry |= {"mean_response_tokens": float(run.tokens), "seconds": {"rollouts": 1.0, "train": 1.0}}
    write_json(directory / "summary.json", {"iterations": [entry], "base_mean_response_tokens": 1.0, "seconds": {}})
    write_steps(checkpoint, run.size)
    with open(directory / "metrics.jsonl", "w", encoding="utf-8") as file:
        for line in (checkpoint / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            file.write(json.dumps({"iteration": 1, **json.loads(line)}) + "\n")


def ledger(run: Run) -> dict[str, float]:
    """Write so many shards of one prompt each, and enter each into the list of finished ones."""
    return rollouts(replace(run, shard_size=1, tokens=1))


def ledger_again(run: Run) -> dict[str, float]:
    """Open the list of so many finished shards."""
    return rollouts_again(replace(run, shard_size=1, tokens=1))


STAGES: dict[str, Stage] = {
    "prompts": Stage(needs=(), measure=prompts),
    "rollouts": Stage(needs=(), measure=rollouts),
    "rollouts, nothing to do": Stage(needs=("rollouts",), measure=rollouts_again),
    "decoding": Stage(needs=(), measure=decoding),
    "scoring": Stage(needs=("rollouts",), measure=score),
    "scoring, nothing to do": Stage(needs=("scoring",), measure=score_again),
    "merge": Stage(needs=("rollouts",), measure=merge),
    "rebuilding a dataset": Stage(needs=("scoring",), measure=rebuild),
    "opening a dataset": Stage(needs=("scoring",), measure=dataset),
    "opening a dataset, other ranks": Stage(needs=("scoring",), measure=dataset_of_others),
    "evaluation": Stage(needs=("rollouts",), measure=evaluate),
    "metrics": Stage(needs=(), measure=metrics),
    "metrics, resumed": Stage(needs=("metrics",), measure=metrics_resumed),
    "report": Stage(needs=("merge",), measure=report),
    "listing an epoch": Stage(needs=(), measure=index),
    "planning a step": Stage(needs=(), measure=planning, unit="step", is_per_step=True),
    "collation": Stage(needs=("scoring",), measure=collation, unit="step", is_per_step=True),
    "reference file": Stage(needs=(), measure=reference),
    "shards entered": Stage(needs=(), measure=ledger, unit="shard"),
    "shards opened": Stage(needs=("shards entered",), measure=ledger_again, unit="shard"),
}


def measure(
    name: str, place: Path, size: int, *, functions_of: Path | None = None, **settings: int
) -> dict[str, float]:
    """Make what a stage reads, where it is not there, then run it under the instruments -> its figures."""
    stage = STAGES[name]
    place.mkdir(parents=True, exist_ok=True)
    for needed in stage.needs:
        if not _marker(place, needed).exists():
            measure(needed, place, size, **settings)
    costs = Instruments(functions_of=functions_of)
    figures = stage.measure(Run(place=place, size=size, costs=costs, **settings))
    _marker(place, name).touch()
    return dataclasses.asdict(costs.total) | figures


def _marker(place: Path, name: str) -> Path:
    return place / f".done-{name.replace(' ', '-')}"
