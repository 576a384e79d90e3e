"""A rank's own part of a distributed optimizer's tensors, as boxes of the tensors in a checkpoint.

The distributed optimizer gives a data-parallel rank a flat range of each parameter, which begins and ends anywhere in a
row. Such a range is a few boxes: the end of a row, whole rows, the beginning of a row; and alike inside of these rows
where there are more dimensions. torch's distributed checkpoint takes any boxes that tile a tensor, checks at a save
that they do (torch 2.13, checkpoint/default_planner.py, _validate_global_plan), and cuts them anew at a load.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Box = tuple[range, ...]
"""Indices along each dimension."""


def sharded_boxes(
    parameter: ShardedTensor | ShardedTensorFactory, name: str, flat_N: torch.Tensor, *, start: int, replica: int
) -> list[ShardedTensor]:
    """Describe a flat range of a parameter's optimizer state to a checkpoint -> views of it, end to end, with places.

    Keys, global shapes and offsets are those of Megatron-Core's `fully_reshardable` layout (0.16.1 and 0.19.2,
    optimizer/distrib_optimizer.py), which describes the parameter's whole state on every rank.

    Args:
        parameter: the model's own description. What a factory makes of it (gate and up of a fused weight) must lie in
            it one after the other.
        name: of the state, such as `exp_avg`.
        flat_N: N values of the state, from that of the parameter's element `start` on.
        replica: 0 on the ranks whose values are saved, among those that the parameter's own replicas leave.
    """
    assert len(parameter.replica_id) == 3, f"expected (pipeline, tensor, data) replicas: {parameter}"
    whole = torch.empty(parameter.data.shape, dtype=flat_N.dtype, device="meta")
    described: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{parameter.key}",
        "data": whole,
        "replica_id": (*parameter.replica_id[:2], replica),
    }
    if isinstance(parameter, ShardedTensorFactory):
        parts = nested_values({"parts": replace(parameter, **described).build()})
    else:
        parts = [replace(parameter, **described, dtype=flat_N.dtype)]
    found, rest_N = [], flat_N.detach()
    for part in sorted(parts, key=lambda part: part.data.storage_offset()):
        assert part.data.is_contiguous(), f"{part.key} is no slice of the rows of {parameter.key}"
        place = start + flat_N.numel() - rest_N.numel() - part.data.storage_offset()
        for box in boxes(part.data.shape, place, place + rest_N.numel()):
            values, rest_N = rest_N.tensor_split([math.prod(map(len, box))])
            found.append(_box_of(part, box, values))
    assert rest_N.numel() == 0, f"{parameter.key}: {rest_N.numel()} of {flat_N.numel()} values have no place"
    return found


def _box_of(part: ShardedTensor, box: Box, values: torch.Tensor) -> ShardedTensor:
    """Describe one box of a local tensor; dimensions that were prepended to it are its own here, as torch wants."""
    num_prepended = part.prepend_axis_num
    corner = [0] * num_prepended + [indices.start for indices in box]
    sizes = (1,) * num_prepended + tuple(map(len, box))
    return replace(
        part,
        data=values.view(sizes),
        local_shape=sizes,
        global_offset=tuple(offset + first for offset, first in zip(part.global_offset, corner, strict=True)),
        axis_fragmentations=None,
        prepend_axis_num=0,
    )


def boxes(sizes: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Yield the elements `start` to `end` - 1 of a tensor's flat form as boxes of the tensor, in order and disjoint.

    There are at most 2 * dimensions - 1. Places before and behind the tensor are none of it.
    """
    start, end = max(0, start), min(math.prod(sizes), end)
    if start >= end:
        return
    if not sizes:
        yield ()
        return
    length = math.prod(sizes[1:])
    first, last = -(-start // length), end // length
    if first > last:  # within one row
        first, last = last, last
    yield from _of_row(sizes, first - 1, start, end)
    if first < last:
        yield range(first, last), *map(range, sizes[1:])
    yield from _of_row(sizes, last, start, end)


def _of_row(sizes: Sequence[int], row: int, start: int, end: int) -> Iterator[Box]:
    length = math.prod(sizes[1:])
    for box in boxes(sizes[1:], start - row * length, end - row * length):
        yield range(row, row + 1), *box
