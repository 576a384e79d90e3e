"""The stages of `benchmarks.scale` that plan, feed and record training, and what a stage is.

A place is a directory for one size. Whatever a stage reads is made there first, uncounted, by the stages before it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.instruments import CountedArray, Instruments
from benchmarks.scale_inputs import NUM_RESPONSES, SyntheticDataset
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.reference_file import read_reference, write_reference
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


def metrics(run: Run) -> dict[str, float]:
    """Write the metrics and the responses of an epoch, 128 responses a step."""
    directory = run.place / "steps"
    directory.mkdir(exist_ok=True)
    with run.costs:
        write_steps(directory, run.size)
    return {}


def metrics_resumed(run: Run) -> dict[str, float]:
    """Open those files again at the last step, as a resumed run does."""
    with run.costs:
        StepFiles(run.place / "steps", run.size * NUM_RESPONSES // 128).close()
    return {}


def write_steps(directory: Path, num_prompts: int) -> None:
    files = StepFiles(directory, 1)
    values = np.random.default_rng(5).normal(size=(4096, 4))
    for step, start in enumerate(range(0, num_prompts * NUM_RESPONSES, 128), start=1):
        number = np.arange(start, min(start + 128, num_prompts * NUM_RESPONSES))
        columns = {"group": number // NUM_RESPONSES, "response": number % NUM_RESPONSES}
        names = ("log_prob", "log_ratio", "win_rate", "target")
        columns |= dict(zip(names, values[number % 4096].T, strict=True))
        files.write(step, {"loss": 1.0, "lr": 1e-6, "grad_norm": 1.0}, columns)
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
