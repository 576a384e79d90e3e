"""Any flat range of a tensor is cut into few boxes of it, and boxes of all ranks tile what a checkpoint holds.

The truth is numpy's numbering of elements, and for places in the whole tensor Megatron-Core's own descriptions of the
model's parameters: prepended layers, tensor-parallel slices, gate and up of a fused weight. What a save and a load make
of the boxes is in tests/distributed/test_optimizer_shards.py.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_sppo.training.optimizer_shards import boxes, sharded_boxes

Description = ShardedTensor | ShardedTensorFactory


@pytest.mark.parametrize("sizes", [(), (5,), (1, 4), (4, 1), (3, 4), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)])
def test_every_range_is_cut_into_few_boxes_that_hold_its_elements_in_order(sizes: tuple[int, ...]) -> None:
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    for start in range(-2, numbers.size + 2):
        for end in range(start, numbers.size + 3):
            found = list(boxes(sizes, start, end))
            elements = [n for box in found for n in numbers[tuple(slice(r.start, r.stop) for r in box)].ravel()]
            assert elements == [n for n in range(start, end) if 0 <= n < numbers.size]
            assert len(found) <= max(1, 2 * len(sizes) - 1)


def one_layer_of_two(weight: torch.Tensor, tensor_rank: int) -> ShardedTensor:
    """Describe the second of two layers' weights, split by rows over two ranks."""
    return ShardedTensor.from_rank_offsets(
        "layers.weight", weight, (0, 1, 2), (1, tensor_rank, 2), replica_id=(0, 0, 3), prepend_axis_num=1
    )


def one_layer_of_two_by_columns(weight: torch.Tensor, tensor_rank: int) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(
        "layers.weight", weight, (0, 1, 2), (2, tensor_rank, 2), replica_id=(0, 0, 3), prepend_axis_num=1
    )


def gate_and_up(weight: torch.Tensor, tensor_rank: int) -> ShardedTensorFactory:
    """Describe gate over up, of which two ranks hold half each: the halves lie apart in the whole tensor."""
    return apply_swiglu_sharded_factory(one_layer_of_two(weight, tensor_rank), ((0, 1, 2),))


@pytest.mark.parametrize("describe", [one_layer_of_two, one_layer_of_two_by_columns, gate_and_up])
@pytest.mark.parametrize("cuts", [(0, 24), (0, 7, 17, 24), (0, 2, 3, 4, 12, 20, 21, 24), tuple(range(25))])
def test_the_ranks_boxes_tile_what_megatron_core_describes(
    describe: Callable[[torch.Tensor, int], Description], cuts: tuple[int, ...]
) -> None:
    theirs, ours, times = {}, {}, {}
    for tensor_rank in (0, 1):
        weight = torch.arange(24, dtype=torch.float32).reshape(6, 4) + 100 * tensor_rank
        description = describe(torch.nn.Parameter(weight), tensor_rank)
        parts = description.build() if isinstance(description, ShardedTensorFactory) else [description]
        for part in parts:
            whole = theirs.setdefault(part.key, torch.full(part.global_shape, -1.0))
            whole[part.global_slice()] = part.data.detach()
        for start, end in pairwise(cuts):
            shard = weight.flatten()[start:end].clone()
            for box in sharded_boxes(description, "exp_avg", shard, start=start, replica=0):
                assert box.replica_id == (0, 0, 0) and not box.has_regular_grid and box.prepend_axis_num == 0
                assert box.data.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
                whole = ours.setdefault(box.key, torch.full(box.global_shape, -1.0))
                times.setdefault(box.key, torch.zeros(box.global_shape))[box.global_slice()] += 1
                whole[box.global_slice()] = box.data
    assert set(ours) == {f"optimizer.state.exp_avg.{key}" for key in theirs}
    for key, whole in theirs.items():
        written = whole != -1  # the other layer is another stage's
        assert torch.equal(ours[f"optimizer.state.exp_avg.{key}"], whole)
        assert torch.equal(times[f"optimizer.state.exp_avg.{key}"], written.float())


def test_a_copy_of_another_pipeline_stage_is_not_saved_and_other_optimizers_copies_are_not() -> None:
    """Tied embeddings lie on the first stage and the last; a distributed optimizer may have several instances."""
    description = ShardedTensor.from_rank_offsets("embedding", torch.zeros(3, 2), replica_id=(1, 0, 5))
    (box,) = sharded_boxes(description, "param", torch.zeros(6), start=0, replica=0)
    assert box.replica_id == (1, 0, 0)
    description.replica_id = (0, 0, 5)
    (box,) = sharded_boxes(description, "param", torch.zeros(6), start=0, replica=1)
    assert box.replica_id == (0, 0, 1)


def test_values_that_have_no_place_are_an_error() -> None:
    description = ShardedTensor.from_rank_offsets("bias", torch.zeros(3), replica_id=(0, 0, 0))
    with pytest.raises(AssertionError, match="bias: 2 of 4 values have no place"):
        sharded_boxes(description, "param", torch.zeros(4), start=1, replica=0)
