"""What an iteration moves to and from files: arithmetic by hand, on rates that make it short."""

import dataclasses
from typing import Any

import pytest

from megatron_sppo.planning.architectures import PUBLISHED
from megatron_sppo.planning.config import MachineConfig, PlanConfig, WorkloadConfig
from megatron_sppo.planning.files import FileTraffic, Passage, file_traffic, peak_disk_bytes
from megatron_sppo.planning.parameters import Grid
from megatron_sppo.training.config import ParallelConfig, RunConfig

WEIGHTS_8B, WEIGHTS_70B = 8_030_261_248, 70_553_706_496
RATES = MachineConfig(
    hash_gb_per_s=2.0,
    thread_write_gb_per_s=4.0,
    thread_read_gb_per_s=8.0,
    storage_gb_per_s=10.0,
    file_system_gb_per_s=100.0,
    device_copy_gb_per_s=20.0,
    gpus_per_node=8,
    cores_per_node=64,
)
LAYOUT_70B = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "sequence_parallel": True}


def traffic(
    model: str, world_size: int, layout: dict[str, Any], *, machine: MachineConfig = RATES, **run: Any
) -> FileTraffic:
    """Plan 100 steps of 60 s, bfloat16, Adam."""
    parallel = ParallelConfig(**layout, use_distributed_optimizer=True)
    config = PlanConfig(parallel=parallel, machine=machine, run=RunConfig(**run))
    grid = Grid(parallel=parallel, world_size=world_size)
    return file_traffic(PUBLISHED[model], config, grid, num_steps=100, step_seconds=60.0)


def passages(found: FileTraffic) -> dict[str, Passage]:
    return {passage.what: passage for passage in found.passages}


def test_8b_on_one_node_of_8_gpus() -> None:
    """W = 16.06 GB, C = 14 P = 112.4 GB, b = C / 8 = 14.05 GB; 8 threads a rank; the node's 10 GB/s are the narrowest.

    A save: b / 20 to the CPU, 2 b / (8 x 2) to hash, C / 10 to write = 0.703 + 1.757 + 11.242 = 13.70 s.
    """
    found = traffic("llama3-8b", 8, {}, save_interval=25)
    weights, checkpoint = 2 * WEIGHTS_8B, 14 * WEIGHTS_8B
    assert (found.weights_bytes, found.checkpoint_bytes) == (weights, checkpoint)
    assert found.rank_bytes == pytest.approx(checkpoint / 8)
    rows = passages(found)
    assert rows["saving checkpoints"].num_times == 4
    assert rows["saving checkpoints"].written_bytes == 4 * checkpoint
    assert rows["saving checkpoints"].waited_seconds == pytest.approx(4 * 13.70, rel=1e-3)
    assert rows["saving checkpoints"].hidden_seconds == 0
    # Three loads: an eighth hashed by one thread each, 1.004 s, and 16.06 GB through the node, 1.606 s.
    assert rows["loading checkpoints"].read_bytes == rows["loading checkpoints"].hashed_bytes == 3 * weights
    assert rows["loading checkpoints"].waited_seconds == pytest.approx(3 * 2.610, rel=1e-3)
    # One process of 16 threads: W / 32 to hash, and 2 W through the node; the hash later W / 32 and W / 10.
    assert rows["export"].waited_seconds == pytest.approx(0.502 + 3.212, rel=1e-3)
    assert rows["hashing the export"].waited_seconds == pytest.approx(0.502 + 1.606, rel=1e-3)
    # Two engine starts.
    assert rows["hand-over to the engine"].read_bytes == 2 * weights
    assert rows["hand-over to the engine"].waited_seconds == pytest.approx(2 * 1.606, rel=1e-3)


def test_70b_on_512_gpus() -> None:
    """TP8 PP4 DP16: C = 988 GB; a stage of 20 layers and a vocabulary, by 8 and then by 16: b = 1.987 GB; 2 threads.

    20 x 855,638,016 + 128,256 x 8192 weights of the fullest stage, without its norms' copies, are 18.163e9; / 128 x 14.
    A save: b / 20, 2 b / (2 x 2), and C through the file system's 100 GB/s = 0.099 + 0.993 + 9.878 = 10.97 s.
    """
    found = traffic("llama3-70b", 512, LAYOUT_70B, save_interval=50)
    assert found.checkpoint_bytes == 14 * WEIGHTS_70B
    assert found.rank_bytes == pytest.approx(1.987e9, rel=1e-3)
    rows = passages(found)
    assert rows["saving checkpoints"].waited_seconds == pytest.approx(2 * 10.97, rel=1e-3)
    # Weights alone: 0.284 GB of the busiest rank hashed by one thread, 141.1 GB through 100 GB/s.
    assert rows["loading checkpoints"].waited_seconds == pytest.approx(3 * (0.142 + 1.411), rel=1e-3)
    # One process on one node: 141.1 GB by 16 threads of 2 GB/s, and twice through its 10 GB/s.
    assert rows["export"].waited_seconds == pytest.approx(4.410 + 28.221, rel=1e-3)
    # 64 nodes read 141.1 GB each; the file system gives 100 GB/s to all of them: 90.3 s a start.
    assert rows["hand-over to the engine"].read_bytes == 2 * 64 * 2 * WEIGHTS_70B
    assert rows["hand-over to the engine"].waited_seconds == pytest.approx(2 * 90.31, rel=1e-3)


def test_a_save_in_the_background_costs_its_copy_and_the_last_one_all() -> None:
    """25 steps of 60 s hide the 13.0 s of writing: 4 copies of 0.703 s, and one writing, are waited for."""
    rows = passages(traffic("llama3-8b", 8, {}, save_interval=25, async_save=True))
    assert rows["saving checkpoints"].waited_seconds == pytest.approx(4 * 0.7026 + 12.999, rel=1e-3)
    assert rows["saving checkpoints"].hidden_seconds == pytest.approx(3 * 12.999, rel=1e-3)
    # A file system of 0.2 GB/s needs 562 s and 1.8 more; every step saves, so that a minute of it is hidden each time.
    slow = dataclasses.replace(RATES, file_system_gb_per_s=0.2)
    rows = passages(traffic("llama3-8b", 8, {}, machine=slow, save_interval=1, async_save=True))
    assert rows["saving checkpoints"].hidden_seconds == pytest.approx(99 * 60)
    assert rows["saving checkpoints"].waited_seconds == pytest.approx(100 * (0.703 + 1.757 + 562.1) - 5940, rel=1e-3)


def test_without_an_interval_the_end_alone_is_saved() -> None:
    assert passages(traffic("llama3-8b", 8, {}))["saving checkpoints"].num_times == 1


@pytest.mark.parametrize(
    ("optimizer", "dtype", "bytes_a_weight"),
    [("adam", "bfloat16", 14), ("adam", "float32", 12), ("rmsprop", "bfloat16", 10), ("rmsprop", "float32", 8)],
)
def test_bytes_a_weight_in_a_checkpoint(optimizer: str, dtype: str, bytes_a_weight: int) -> None:
    base = PlanConfig()
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, params_dtype=dtype),
        optimization=dataclasses.replace(base.optimization, optimizer=optimizer),
    )
    grid = Grid(parallel=config.parallel, world_size=1)
    found = file_traffic(PUBLISHED["llama3-8b"], config, grid, num_steps=1, step_seconds=1.0)
    assert found.checkpoint_bytes == bytes_a_weight * WEIGHTS_8B


@pytest.mark.parametrize(
    ("keep_last", "keep_iterations", "expected"),
    [
        # W = 2, C = 14, four saves: 2 + 2 x (4 x 14 + 2) + (4 x 14 + 2)
        (None, None, 176),
        # One checkpoint an iteration; the last is written before the one before it goes: 2 + 2 x (14 + 2) + 2 x 14
        (1, None, 62),
        # One older iteration beside the one under way.
        (1, 1, 46),
        (None, 1, 2 + 58 + 58),
        (4, 5, 176),
    ],
)
def test_the_disk_of_a_run_of_three_iterations(
    keep_last: int | None, keep_iterations: int | None, expected: int
) -> None:
    kept = {"keep_last": keep_last, "keep_iterations": keep_iterations}
    assert peak_disk_bytes(2, 14, saves=4, iterations=3, **kept) == expected


def test_what_is_kept_reaches_the_plan() -> None:
    config = PlanConfig(
        run=RunConfig(save_interval=25, keep_last=1), workload=WorkloadConfig(num_iterations=5, keep_iterations=1)
    )
    grid = Grid(parallel=config.parallel, world_size=8)
    found = file_traffic(PUBLISHED["llama3-8b"], config, grid, num_steps=100, step_seconds=1.0)
    assert found.peak_disk_bytes == (2 + (14 + 2) + 2 * 14) * WEIGHTS_8B
