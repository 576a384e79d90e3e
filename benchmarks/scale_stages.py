"""The stages that `benchmarks.scale` measures: what each needs, and one run of it.

A place is a directory for one size. Whatever a stage reads is made there first, uncounted, by the stages before it.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.instruments import CountedArray, Instruments
from benchmarks.scale_inputs import (
    NUM_RESPONSES,
    FakeJudge,
    FakeSampler,
    SlotEngine,
    SyntheticDataset,
    write_model,
    write_prompts,
)
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.reference_file import read_reference, write_reference
from megatron_sppo.judge import evaluation
from megatron_sppo.judge import score as scoring
from megatron_sppo.judge.config import EvaluateConfig, ScoreConfig
from megatron_sppo.judge.work_list import WorkList
from megatron_sppo.report.page import write_report
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.rollout.generate import generate_rollouts
from megatron_sppo.rollout.prompts import PromptRows
from megatron_sppo.rollout.sampler import Shard
from megatron_sppo.rollout.vllm_engine import RequestStream
from megatron_sppo.storage import write_json
from megatron_sppo.training import parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import BatchConfig, OptimizationConfig, TrainingConfig
from megatron_sppo.training.metrics import StepFiles

DATA_PARALLEL = 64


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one stage."""

    place: Path
    size: int
    """Prompts, or shards where the stage says so."""
    shard_size: int
    tokens: int
    """Of an answer."""
    global_batch_size: int
    num_steps: int
    """Steps that are planned, from the middle of an epoch."""
    costs: Instruments


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage."""

    needs: tuple[str, ...]
    """Stages whose output this one reads."""
    measure: Callable[[Run], dict[str, float]]
    """Prepare, run under the instruments -> figures beside the instruments' own."""
    unit: str = "prompt"
    is_per_step: bool = False
    """Its cost must not depend on the size at all."""


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
    with _fake_judge(scoring, run.costs), run.costs:
        scoring.score(_scoring(run), WorkList())
    return {}


def merge(run: Run) -> dict[str, float]:
    """Make the dataset of the finished score files, which one rank does while the others are done."""
    original = scoring.merge_scores

    def measured(*arguments: Any, **settings: Any) -> Any:
        with run.costs:
            return original(*arguments, **settings)

    config = replace(_scoring(run), output=run.place / "merged")
    with _fake_judge(scoring, Instruments()), patch.object(scoring, "merge_scores", measured):
        scoring.score(config, WorkList())
    return {}


def score_again(run: Run) -> dict[str, float]:
    """Give the same command again, which finds nothing to judge."""
    with _fake_judge(scoring, run.costs), run.costs:
        scoring.score(_scoring(run), WorkList())
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
def _fake_judge(module: Any, costs: Instruments) -> Iterator[None]:
    judge = FakeJudge()
    judge.judge_logits = costs.leave_out(judge.judge_logits)  # type: ignore[method-assign]
    with patch.object(module, "load_judge", lambda *_, **__: judge):
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
    with _fake_judge(evaluation, run.costs), run.costs:
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
    for name in ("rollouts", "dataset"):
        os.symlink((run.place / name).resolve(), directory / "iter_1" / name)
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
    _write_steps(checkpoint, run.size)
    with open(directory / "metrics.jsonl", "w", encoding="utf-8") as file:
        for line in (checkpoint / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            file.write(json.dumps({"iteration": 1, **json.loads(line)}) + "\n")


def metrics(run: Run) -> dict[str, float]:
    """Write the metrics and the responses of an epoch, 128 responses a step."""
    directory = run.place / "steps"
    directory.mkdir(exist_ok=True)
    with run.costs:
        _write_steps(directory, run.size)
    return {}


def metrics_resumed(run: Run) -> dict[str, float]:
    """Open those files again at the last step, as a resumed run does."""
    with run.costs:
        StepFiles(run.place / "steps", run.size * NUM_RESPONSES // 128, tensorboard=False).close()
    return {}


def _write_steps(directory: Path, num_prompts: int) -> None:
    files, number = StepFiles(directory, 1, tensorboard=False), 0
    values = np.random.default_rng(5).normal(size=(4096, 4)).tolist()
    for step, start in enumerate(range(0, num_prompts * NUM_RESPONSES, 128), start=1):
        rows = []
        for number in range(start, min(start + 128, num_prompts * NUM_RESPONSES)):
            log_prob, log_ratio, win_rate, target = values[number % 4096]
            rows.append(
                {
                    "group": number // NUM_RESPONSES,
                    "response": number % NUM_RESPONSES,
                    "log_prob": log_prob,
                    "log_ratio": log_ratio,
                    "win_rate": win_rate,
                    "target": target,
                }
            )
        files.write(step, {"loss": 1.0, "lr": 1e-6, "grad_norm": 1.0}, rows)
    files.close()


def planning(run: Run) -> dict[str, float]:
    """Plan and collate steps of 1,024 responses as the first of 64 data-parallel ranks does, of lengths alone."""
    source: Any = SyntheticDataset(run.size, run.place)
    config = _training(run, global_batch_size=run.global_batch_size)
    with _first_rank_of(DATA_PARALLEL):
        batches = Batches(source, config, max_length=4096)
        first = max(1, batches.steps_per_epoch // 2)
        next(batches.steps(first=first, last=first))  # which shuffles the epoch, once
        batches.index = _counted(batches.index)
        CountedArray.touched = 0
        next(batches.steps(first=first, last=first))
        touched = CountedArray.touched
        seconds = []
        batches.index = _plain(batches.index)
        last = min(first + run.num_steps - 1, batches.train_iters)
        with run.costs:
            for step in range(first, last + 1):
                began = time.thread_time()
                next(batches.steps(first=step, last=step))
                seconds.append(time.thread_time() - began)
    return {"seconds_a_step": float(np.median(seconds)), "elements_a_step": float(touched)}


@contextmanager
def _first_rank_of(number: int) -> Iterator[None]:
    """Plan as the first of so many data-parallel ranks, none of which exists."""
    with (
        patch.object(parallel, "data_parallel_size", lambda: number),
        patch.object(parallel, "data_parallel_rank", lambda: 0),
    ):
        yield


def _counted(index: Any) -> Any:
    names = ("group", "response", "prompt_lengths", "response_lengths")
    made = replace(index, **{name: getattr(index, name).view(CountedArray) for name in names})
    _ = made.lengths  # kept or not, the first time is not a step's
    return made


def _plain(index: Any) -> Any:
    names = ("group", "response", "prompt_lengths", "response_lengths")
    made = replace(index, **{name: getattr(index, name).view(np.ndarray) for name in names})
    _ = made.lengths
    return made


def index(run: Run) -> dict[str, float]:
    """List an epoch's rows and targets, and shuffle them: once a run, of lengths alone."""
    source: Any = SyntheticDataset(run.size, run.place)
    config = _training(run, global_batch_size=run.global_batch_size)
    with _first_rank_of(DATA_PARALLEL), run.costs:
        batches = Batches(source, config, max_length=4096)
        next(batches.steps(first=1, last=1))
    return {}


def collation(run: Run) -> dict[str, float]:
    """Plan and collate steps of 128 responses from the dataset's files, on one rank."""
    source = PreferenceDataset(run.place / "dataset")
    with _first_rank_of(1):
        batches = Batches(source, _training(run, global_batch_size=128), max_length=4096)
        steps = batches.steps(first=1, last=min(run.num_steps + 1, batches.train_iters))
        next(steps)  # which shuffles the epoch, once
        seconds, tokens, began = [], [], time.thread_time()
        with run.costs:
            for plan in steps:
                seconds.append(time.thread_time() - began)
                tokens.append(plan.num_tokens)
                began = time.thread_time()
    return {"seconds_a_step": float(np.median(seconds)), "tokens_a_second": sum(tokens) / sum(seconds)}


def reference(run: Run) -> dict[str, float]:
    """Write the reference file of all responses, and read it."""
    values = np.random.default_rng(6).normal(size=(run.size, NUM_RESPONSES)).astype(np.float32)
    directory = run.place / "reference"
    with run.costs:
        write_reference(directory, values, {"weights_hash": "scale"})
        read_reference(directory, {"weights_hash": "scale"})
    return {}


def _training(run: Run, *, global_batch_size: int) -> TrainingConfig:
    return TrainingConfig(
        load=run.place,
        data=run.place / "dataset",
        save=run.place,
        optimization=OptimizationConfig(lr=1e-6),
        batch=BatchConfig(global_batch_size=global_batch_size, packed_sequence_size=4096),
    )


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
    "report": Stage(needs=("scoring",), measure=report),
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
