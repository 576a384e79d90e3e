"""Worlds of up to 4096 ranks, simulated: groups, shapes and shares are right, and planning a step costs no more there.

Expected ranks come from Megatron's order by arithmetic: rank = tensor + TP (context + CP (data + DP pipeline)). Nothing
is sent: collectives themselves are proved on real gloo ranks (tests/distributed).
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from megatron.core import parallel_state

from benchmarks.simulation import simulated_rank
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.packing import assign_to_ranks, document_cost, pack
from megatron_sppo.data.writer import DatasetWriter
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import build_stage
from megatron_sppo.planning.architectures import PUBLISHED
from megatron_sppo.planning.parameters import Grid, stage_shards
from megatron_sppo.training import parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import BatchConfig, OptimizationConfig, ParallelConfig, TrainingConfig
from megatron_sppo.training.policy import mcore_config

BIG = ParallelConfig(
    tensor_model_parallel_size=8,
    sequence_parallel=True,
    pipeline_model_parallel_size=4,
    context_parallel_size=2,
    use_distributed_optimizer=True,
)


def ranks_of(group: torch.distributed.ProcessGroup) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)


@pytest.mark.parametrize(("world_size", "rank"), [(64, 37), (512, 300), (4096, 0), (4096, 2731), (4096, 4095)])
def test_groups_are_megatron_s_by_arithmetic(world_size: int, rank: int) -> None:
    tensor_size, context_size, stages = 8, 2, 4
    data_size = world_size // (tensor_size * context_size * stages)

    def at(tensor: int, context: int, data: int, pipeline: int) -> int:
        return tensor + tensor_size * (context + context_size * (data + data_size * pipeline))

    tensor, rest = rank % tensor_size, rank // tensor_size
    context, rest = rest % context_size, rest // context_size
    data, pipeline = rest % data_size, rest // data_size
    with simulated_rank(BIG, rank=rank, world_size=world_size):
        expected: dict[Callable[[], torch.distributed.ProcessGroup], list[int]] = {
            parallel_state.get_tensor_model_parallel_group: [
                at(i, context, data, pipeline) for i in range(tensor_size)
            ],
            parallel_state.get_context_parallel_group: [at(tensor, i, data, pipeline) for i in range(context_size)],
            parallel_state.get_data_parallel_group: [at(tensor, context, i, pipeline) for i in range(data_size)],
            parallel_state.get_pipeline_model_parallel_group: [at(tensor, context, data, i) for i in range(stages)],
        }
        for group, ranks in expected.items():
            assert ranks_of(group()) == ranks
        sharing = ranks_of(parallel_state.get_data_parallel_group(with_context_parallel=True))
        assert sharing == [at(tensor, c, d, pipeline) for d in range(data_size) for c in range(context_size)]
        assert parallel.data_parallel_rank() == data and parallel.data_parallel_size() == data_size
        assert (parallel.tensor_parallel_rank(), parallel.context_parallel_rank()) == (tensor, context)
        assert parallel.is_first_stage() == (pipeline == 0) and parallel.is_last_stage() == (pipeline == stages - 1)


@pytest.mark.parametrize("rank", [0, 1500, 4095])
def test_llama_3_70b_s_shapes_on_sampled_ranks_of_4096(rank: int) -> None:
    """The real stage on the meta device, which takes no memory, and by formula."""
    architecture, model = PUBLISHED["llama3-70b"], ModelConfig(transformer_impl="torch")
    grid = Grid(parallel=BIG, world_size=4096)
    stage = rank * 4 // 4096
    with simulated_rank(BIG, rank=rank, world_size=4096), torch.device("meta"):
        config = mcore_config(architecture, model, BIG)
        real = build_stage(architecture, config, model, pre_process=stage == 0, post_process=stage == 3)
        shapes = {name: tuple(parameter.shape) for name, parameter in real.named_parameters()}
    (shards,) = stage_shards(architecture, grid, stage)
    assert sorted(shard.numel for shard in shards) == sorted(int(np.prod(shape)) for shape in shapes.values())
    assert len(real.decoder.layers) == 20
    layer = "decoder.layers.0."
    assert shapes[layer + "self_attention.linear_qkv.weight"] == ((64 + 2 * 8) * 128 // 8, 8192)
    assert shapes[layer + "mlp.linear_fc1.weight"] == (2 * 28672 // 8, 8192)
    assert ("embedding.word_embeddings.weight" in shapes) == (stage == 0)
    assert ("output_layer.weight" in shapes) == (stage == 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataset:
    """2,048 prompts of 10 tokens with four answers each, of log-normal lengths up to 200."""
    directory, generator = tmp_path_factory.mktemp("data") / "data", np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(40), 0.6, (2048, 4)), 2, 200).astype(int)
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
        for group in lengths:
            writer.append([1] * 10, [[2] * length for length in group], np.zeros((4, 4), np.float32))
    return PreferenceDataset(directory)


def batches_of(dataset: PreferenceDataset, *, global_batch_size: int) -> Batches:
    nowhere = Path("-")
    config = TrainingConfig(
        load=nowhere,
        data=nowhere,
        save=nowhere,
        optimization=OptimizationConfig(lr=1e-6),
        batch=BatchConfig(micro_batch_size=4, global_batch_size=global_batch_size),
    )
    return Batches(dataset, config, max_length=512)


def be_data_parallel_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """All that planning a step asks of the world."""
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: rank)
    monkeypatch.setattr(parallel, "data_parallel_size", lambda: size)


def test_a_step_is_shared_out_once_and_evenly(dataset: PreferenceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 ranks of 32 responses, eight micro-batches of four: every row once, no rank 5 % above the mean in tokens."""
    batches = batches_of(dataset, global_batch_size=2048)
    rows, tokens = [], []
    for rank in range(64):
        be_data_parallel_rank(monkeypatch, rank, 64)
        (plan,) = batches.steps(first=1, last=1)
        assert len(plan.micro_batches) == 8
        here = np.concatenate([batch.rows.numpy() for batch in plan.micro_batches])
        rows.append(here)
        tokens.append(int(batches.index.lengths[here].sum()))
        assert plan.attended_positions == sum(n * (n + 1) // 2 for n in batches.index.lengths[plan.rows].tolist())
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.sort(plan.rows))
    assert max(tokens) <= 1.05 * sum(tokens) / 64


def test_planning_a_step_costs_no_more_in_a_larger_world(
    dataset: PreferenceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One global batch of 8,192 responses, as one of 8 ranks and as one of 1,024, in turn: CPU time, least of five."""
    batches = batches_of(dataset, global_batch_size=8192)

    def seconds(size: int) -> float:
        be_data_parallel_rank(monkeypatch, size - 1, size)
        begin = time.process_time()
        next(batches.steps(first=1, last=1))
        return time.process_time() - begin

    large, small = zip(*((seconds(1024), seconds(8)) for _ in range(5)), strict=True)
    assert min(large) <= 1.5 * min(small)


def test_packs_are_dealt_evenly_to_a_thousand_ranks() -> None:
    """Four packs of 8192 tokens a rank, cost with attention's part: no rank with more than 2 % above the mean."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(400), 0.6, 4 * 1024 * 16), 20, 2048).astype(np.int64)
    packs = pack(lengths, budget=8192)
    packs = packs[: len(packs) // 1024 * 1024]
    cost = np.array([document_cost(lengths[rows], crossover_length=53_000).sum() for rows in packs])
    load = np.array([cost[members].sum() for members in assign_to_ranks(cost, num_ranks=1024)])
    assert load.max() <= 1.02 * load.mean()
