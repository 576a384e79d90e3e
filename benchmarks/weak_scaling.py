"""Weak scaling by simulation: what one rank does at start and for each step, in worlds of 8 to 4096 ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.weak_scaling

Torch's fake process group gives one process the view of one rank; nothing is sent. Timed are Megatron-Core's process
groups, building the rank's share of Llama-3-70B on the meta device, and planning the micro-batches of a step that grows
with the world (16 responses a data-parallel rank) and of one that does not (1,024 responses). There is no peer: the
target is that a rank's own work does not grow with the world, and that the shared plan grows by the responses alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.record import Row, describe_cpu, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.data.microbatch import plan_step
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import build_stage
from megatron_sppo.planning.architectures import PUBLISHED
from megatron_sppo.planning.simulation import simulated_rank
from megatron_sppo.training import parallel
from megatron_sppo.training.parallel import ParallelConfig
from megatron_sppo.training.policy import host_config

NAME = "weak_scaling.py"
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


def groups_and_stage(world_size: int) -> tuple[float, float]:
    """Be the last rank of a world -> CPU seconds of its groups, of its stage on the meta device."""
    architecture, model = PUBLISHED["llama3-70b"], ModelConfig(transformer_impl="torch")
    begin = time.process_time()
    with simulated_rank(_LAYOUT, rank=world_size - 1, world_size=world_size):
        groups = time.process_time() - begin
        begin = time.process_time()
        with torch.device("meta"):
            config = host_config(architecture, model, _LAYOUT)
            build_stage(
                architecture,
                config,
                model,
                pre_process=parallel.is_first_stage(),
                post_process=parallel.is_last_stage(),
            )
        return groups, time.process_time() - begin


def step_seconds(world_size: int, *, responses: int, repeats: int) -> float:
    """Plan one step for every data-parallel rank, as each rank does -> CPU seconds."""
    lengths = np.random.default_rng(0).integers(50, 2000, responses)
    ranks = world_size // _LAYOUT.model_parallel_size

    def plan() -> object:
        return plan_step(np.arange(responses), lengths, data_parallel_size=ranks, micro_batch_size=1, unit_size=1)

    return least(plan, repeats)


def main() -> None:
    """Measure and write benchmarks/results/<machine>/weak_scaling.json."""
    config = parse(WeakScalingConfig, name=NAME, description=str(__doc__))
    groups_and_stage(config.world_sizes[0])  # the host's own first use
    measured: dict[str, list[float]] = {}
    for world_size in config.world_sizes:
        taken = [groups_and_stage(world_size) for _ in range(config.repeats)]
        ranks = world_size // _LAYOUT.model_parallel_size
        growing = 16 * ranks
        values = {
            "process groups at start": min(groups for groups, _ in taken),
            "this rank's stage": min(stage for _, stage in taken),
            "a step of 1,024 responses": step_seconds(world_size, responses=1024, repeats=config.repeats),
            "a step of 16 responses a rank, a response": step_seconds(
                world_size, responses=growing, repeats=config.repeats
            )
            / growing,
        }
        for name, value in values.items():
            measured.setdefault(name, []).append(value)
            print(f"    {world_size} ranks: {name} {value:.3g} CPU seconds", flush=True)
    rows = []
    for name, values in measured.items():
        bounded = name != "process groups at start"
        for world_size, value in zip(config.world_sizes[1:], values[1:], strict=True):
            ratio = value / values[0]
            rows.append(
                Row(
                    id="W1",
                    metric=f"CPU seconds, {name}, {world_size} ranks",
                    ours=value,
                    peer=values[0],
                    peer_name=f"{config.world_sizes[0]} ranks",
                    ratio=ratio,
                    target="<= 2" if bounded else "(Megatron-Core lists every group of the world; once a run)",
                    met=ratio <= 2 if bounded else None,
                )
            )
    write_results(
        "weak_scaling", rows, machine=config.machine or describe_cpu(), packages=["torch", "megatron-core", "numpy"]
    )


if __name__ == "__main__":
    run_tool(main, name=NAME)
