"""Weak scaling by simulation: what one rank does at start and for each step, in worlds of 8 to 4096 ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.weak_scaling

Torch's fake process group gives one process the view of one rank; nothing is sent. Timed are Megatron-Core's process
groups, building the rank's share of Llama-3-70B on the meta device, and planning and reading a step that grows with the
world (16 responses a data-parallel rank) and one that does not (1,024 responses). There is no peer: the target is that
a rank's own work does not grow with the world. What must grow is shown.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import Row, describe_machine, write_results
from benchmarks.simulation import simulated_rank
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.writer import DatasetWriter
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import build_stage
from megatron_sppo.planning.architectures import PUBLISHED
from megatron_sppo.training import parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import BatchConfig, OptimizationConfig, ParallelConfig, TrainingConfig
from megatron_sppo.training.policy import mcore_config

NAME = "weak_scaling.py"
_GROWING = {
    "process groups at start": "Megatron-Core lists every group of the world, once a run",
    "a step of 16 responses a rank": "each rank plans the whole batch, and reads its own part",
}
_FIXED = 1024
"""Responses of the step that does not grow."""
_LAYOUT = ParallelConfig(
    tensor_model_parallel_size=4, sequence_parallel=True, pipeline_model_parallel_size=2, use_distributed_optimizer=True
)


@dataclass(frozen=True, kw_only=True)
class WeakScalingConfig:
    """What is simulated."""

    world_sizes: tuple[int, ...] = (8, 64, 512, 4096)
    """Ranks; multiples of 8 (TP4 x PP2). Ratios are taken against the first."""
    repeats: int = 5
    """Times each is taken; the least counts."""
    machine: str | None = None
    """Folder of the results; unset: named after the processor."""


def least(function: Callable[[], object], repeats: int) -> float:
    """Time a function `repeats` times -> least CPU seconds."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def start_seconds(world_size: int) -> tuple[float, float]:
    """Be the last rank of a world -> CPU seconds of its groups, of its stage on the meta device."""
    architecture, model = PUBLISHED["llama3-70b"], ModelConfig(transformer_impl="torch")
    begin = time.process_time()
    with simulated_rank(_LAYOUT, rank=world_size - 1, world_size=world_size):
        groups = time.process_time() - begin
        begin = time.process_time()
        with torch.device("meta"):
            config = mcore_config(architecture, model, _LAYOUT)
            build_stage(
                architecture,
                config,
                model,
                pre_process=parallel.is_first_stage(),
                post_process=parallel.is_last_stage(),
            )
        return groups, time.process_time() - begin


def step_seconds(data: Path, world_size: int, *, responses: int, repeats: int) -> float:
    """Plan and collate one step as the last rank of a world does -> CPU seconds."""
    config = TrainingConfig(
        load=data,
        data=data,
        save=data,
        optimization=OptimizationConfig(lr=1e-6),
        batch=BatchConfig(global_batch_size=responses),
        parallel=_LAYOUT,
    )
    batches = Batches(PreferenceDataset(data), config, max_length=2048)
    with simulated_rank(_LAYOUT, rank=world_size - 1, world_size=world_size):
        return least(lambda: next(batches.steps(first=1, last=1)), repeats)


def write_answers(directory: Path, num_responses: int) -> Path:
    """Write answers of 50 to 2000 tokens to prompts of ten, four a prompt -> the dataset."""
    generator = np.random.default_rng(0)
    with DatasetWriter(
        directory,
        num_responses=4,
        tokenizer_hash=None,
        vocab_size=100,
        judge="rules:concise",
        preset="paper",
        selection="all",
        rollouts_sha256=None,
    ) as writer:
        for _ in range(-(-num_responses // 4)):
            answers = [[1] * int(length) for length in generator.integers(50, 2000, 4)]
            writer.append([2] * 10, answers, np.zeros((4, 4), np.float32))
    return directory


def main() -> None:
    """Measure and write benchmarks/results/<machine>/weak_scaling.json."""
    config = parse(WeakScalingConfig, name=NAME, description=str(__doc__))
    start_seconds(config.world_sizes[0])  # the host's own first use
    with tempfile.TemporaryDirectory() as directory:
        most = 16 * max(config.world_sizes) // _LAYOUT.model_parallel_size
        measured = measure(config, write_answers(Path(directory, "data"), max(most, _FIXED)))
    rows = rows_of(config, measured)
    write_results(
        "weak_scaling", rows, machine=config.machine or describe_machine(), packages=["torch", "megatron-core", "numpy"]
    )


def measure(config: WeakScalingConfig, data: Path) -> dict[str, list[float]]:
    """Simulate every world size -> {what: CPU seconds by world size}."""
    measured: dict[str, list[float]] = {}
    for world_size in config.world_sizes:
        taken = [start_seconds(world_size) for _ in range(config.repeats)]
        growing = 16 * world_size // _LAYOUT.model_parallel_size
        values = {
            "process groups at start": min(groups for groups, _ in taken),
            "this rank's stage": min(stage for _, stage in taken),
            "a step of 1,024 responses": step_seconds(data, world_size, responses=_FIXED, repeats=config.repeats),
            "a step of 16 responses a rank": step_seconds(data, world_size, responses=growing, repeats=config.repeats),
        }
        for name, value in values.items():
            measured.setdefault(name, []).append(value)
            print(f"    {world_size} ranks: {name} {value:.3g} CPU seconds", flush=True)
    return measured


def rows_of(config: WeakScalingConfig, measured: dict[str, list[float]]) -> list[Row]:
    """Hold every world size against the first -> rows."""
    rows = []
    for name, values in measured.items():
        why_it_grows = _GROWING.get(name)
        why = "" if why_it_grows is None else f" ({why_it_grows})"
        for world_size, value in zip(config.world_sizes[1:], values[1:], strict=True):
            ratio = value / values[0]
            rows.append(
                Row(
                    id="W1",
                    metric=f"CPU seconds, {name}, {world_size} ranks{why}",
                    ours=value,
                    peer=values[0],
                    peer_name=f"{config.world_sizes[0]} ranks",
                    ratio=ratio,
                    target="<= 2" if why_it_grows is None else None,
                    met=ratio <= 2 if why_it_grows is None else None,
                )
            )
    return rows


if __name__ == "__main__":
    run_tool(main, name=NAME)
