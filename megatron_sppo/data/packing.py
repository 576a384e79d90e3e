"""Sequences of many lengths into packs of one budget, and items of unlike cost to bins of like load.

N = rows, U = units (a row, or the rows of a pair), I = items (units or packs). No randomness: the same lengths give the
same packs. Nothing here looks at the order of an epoch: what is packed together is trained on together, so the caller
shuffles the units first and packs as many at a time as may share a step (`steps.divide_step`).
"""

import heapq
from collections import defaultdict

import numpy as np

from megatron_sppo.errors import DataError


def pack(lengths_N: np.ndarray, *, budget: int, rows_per_loss: int = 1) -> list[np.ndarray]:
    """Fill packs of at most `budget` tokens by best-fit decreasing -> the rows of each pack, units side by side.

    Longest units first, each into the fullest pack that has room. Units of one length are placed together: packs wait
    in buckets of equal room, and the fullest with room for n tokens takes room // n of them at once, which is what
    best-fit would do one by one. So the work grows with the sort of N lengths and the buckets touched, not with N * P.

    Args:
        lengths_N: [N], tokens of every row, padding of the document included.
        budget: tokens a pack holds.
        rows_per_loss: consecutive rows that stay in one pack; 2 where a loss couples pairs.

    Raises:
        DataError: a unit is longer than the budget, or has no tokens.
    """
    lengths = np.asarray(lengths_N, dtype=np.int64)
    assert lengths.ndim == 1 and rows_per_loss > 0 and len(lengths) % rows_per_loss == 0, (
        f"{lengths.shape} by {rows_per_loss}"
    )
    if not len(lengths):
        return []
    units = lengths.reshape(-1, rows_per_loss)
    size_U = _unit_sizes(units, budget=budget)
    order, first, each, placed = _best_fit_decreasing(size_U, budget=budget)
    # The units of a placement lie in packs that follow each other, so many in each.
    begin = np.repeat(np.cumsum(placed) - placed, placed)
    pack_of_unit = np.empty(len(size_U), dtype=np.int64)
    pack_of_unit[order] = np.repeat(first, placed) + (np.arange(len(size_U)) - begin) // np.repeat(each, placed)
    by_pack = np.argsort(pack_of_unit, kind="stable")
    rows = (by_pack[:, None] * rows_per_loss + np.arange(rows_per_loss)).reshape(-1)
    return cut(rows, np.bincount(pack_of_unit) * rows_per_loss)


def count_packs(size_U: np.ndarray, *, budget: int) -> int:
    """Count the packs that `pack` fills -> int."""
    if not len(size_U):
        return 0
    _, first, each, placed = _best_fit_decreasing(
        _unit_sizes(np.asarray(size_U, dtype=np.int64).reshape(-1, 1), budget=budget), budget=budget
    )
    return int((first + -(-placed // each)).max())


def cut(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Cut an array into pieces of these sizes -> views."""
    ends = np.cumsum(sizes).tolist()
    return [values[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _unit_sizes(units: np.ndarray, *, budget: int) -> np.ndarray:
    """Add up each unit's tokens -> [U], every one in [1, budget]."""
    size: np.ndarray = units.sum(axis=1)
    if units.min() < 1:
        row = int(units.argmin())
        raise DataError(f"row {row} has {int(units.min())} tokens. Drop rows without tokens before packing.")
    if size.max() > budget:
        first = int(size.argmax()) * units.shape[1]
        rows = f"row {first} has" if units.shape[1] == 1 else f"rows {first} to {first + units.shape[1] - 1} have"
        raise DataError(f"{rows} {size.max()} tokens and a pack holds {budget}. Use --seq-length {size.max()}.")
    return size


def _best_fit_decreasing(size_U: np.ndarray, *, budget: int) -> tuple[np.ndarray, ...]:
    """Give every unit its pack -> (units from the longest, then of each placement: first pack, units a pack, units).

    A placement puts units that follow each other in that order into packs that follow each other. Packs are numbered
    from 0 in the order in which they were opened.
    """
    order = np.argsort(-size_U, kind="stable")
    starts = np.flatnonzero(np.diff(size_U[order], prepend=-1))
    waiting: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # room -> (first pack, how many) with just it
    has_room = 0  # bit r is set where waiting[r] holds packs
    num_packs = 0
    placements: list[tuple[int, int, int]] = []
    for size, left in zip(size_U[order[starts]].tolist(), np.diff(starts, append=len(order)).tolist(), strict=True):
        while left:
            fitting = has_room >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                first, count = waiting[room].pop()
                if not waiting[room]:
                    has_room ^= 1 << room
            else:
                room, first, count = budget, num_packs, -(-left // (budget // size))
                num_packs += count
            each = room // size
            num_full, rest = divmod(min(left, each * count), each)
            placed = num_full * each + rest
            placements.append((first, each, placed))
            left -= placed
            # At most three kinds are left: packs that took all they could, one that took the rest, and untouched ones.
            num_touched = num_full + (rest > 0)
            for empty, begin, end in (
                (room - each * size, 0, num_full),
                (room - rest * size, num_full, num_touched),
                (room, num_touched, count),
            ):
                if empty and begin < end:
                    waiting[empty].append((first + begin, end - begin))
                    has_room |= 1 << empty
    return order, *np.array(placements, dtype=np.int64).T


def document_cost(lengths_N: np.ndarray, *, crossover_length: float, context_N: np.ndarray | int = 0) -> np.ndarray:
    """Estimate each document's time, in tokens of linear work: n * (1 + (n + 2c) / crossover_length) -> [N] float64.

    Args:
        lengths_N: [N], tokens that are computed.
        crossover_length: tokens of a document at which attention takes as long as all else.
        context_N: tokens before them that they see and that are computed once for several documents (c above).
    """
    lengths = np.asarray(lengths_N, dtype=np.float64)
    cost: np.ndarray = lengths * (1 + (lengths + 2 * np.asarray(context_N)) / crossover_length)
    return cost


def assign_to_ranks(cost_P: np.ndarray, *, num_ranks: int) -> list[np.ndarray]:
    """Share packs out, costliest first, each to the least loaded rank with room -> packs of each rank, costliest first.

    Room for ceil(P / num_ranks) packs a rank: the ranks of a data-parallel step run equally many micro-batches, so a
    multiple of `num_ranks` packs wastes none.
    """
    ranks = spread_by_cost(cost_P, num_bins=num_ranks, capacity=-(-len(cost_P) // num_ranks))
    assert ranks is not None
    return ranks


def spread_by_cost(
    cost_I: np.ndarray, *, num_bins: int, capacity: int, size_I: np.ndarray | None = None
) -> list[np.ndarray] | None:
    """Share items out, costliest first, each to the least loaded bin with room -> items of each bin, costliest first.

    Longest processing time first (Graham 1969), with room. None where that leaves an item no bin.

    Args:
        size_I: [I], how much of a bin's capacity each item takes; None: 1 each.
    """
    cost_of = np.asarray(cost_I, dtype=np.float64)
    size = [1] * len(cost_of) if size_I is None else np.asarray(size_I).tolist()
    assert num_bins > 0
    least = min(size, default=capacity)
    room = [capacity] * num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    open_bins = [(0.0, index) for index in range(num_bins)]
    order = np.argsort(-cost_of, kind="stable")
    for item, cost in zip(order.tolist(), cost_of[order].tolist(), strict=True):
        passed = []
        while open_bins and room[open_bins[0][1]] < size[item]:
            passed.append(heapq.heappop(open_bins))
        if not open_bins:
            return None
        load, index = open_bins[0]
        bins[index].append(item)
        room[index] -= size[item]
        if room[index] >= least:
            heapq.heapreplace(open_bins, (load + cost, index))
        else:
            heapq.heappop(open_bins)
        for entry in passed:
            heapq.heappush(open_bins, entry)
    flat = np.array([item for members in bins for item in members], dtype=np.int64)
    return cut(flat, np.array([len(members) for members in bins]))
