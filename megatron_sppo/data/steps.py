"""Which rows an epoch visits in which order, and which of a step's rows share a micro-batch.

N = rows, U = units of a step: what a micro-batch takes whole (a row, a pair, or rows of one prompt that share it).
No randomness but `epoch_order`; no process groups: the caller says how many data-parallel ranks there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sppo.data.packing import assign_to_ranks, count_packs, cut, document_cost, pack, spread_by_cost
from megatron_sppo.data.selection import TrainingIndex

_EVEN = 1.005
"""Ranks are even where the busiest has at most this many times the mean to do."""


def epoch_order(num_units: int, *, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the units (rows, pairs or prompts) of an epoch -> [num_units] int64, a permutation.

    Sorts raw words of PCG64, whose stream numpy guarantees for ever; `Generator.permutation` may change with a release.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_units)
    return np.argsort(words, kind="stable")


def epoch_rows(index: TrainingIndex, *, seed: int, epoch: int, by_prompt: bool) -> np.ndarray:
    """List an epoch's rows in the order in which they are trained on -> [N] int64, pairs side by side.

    Args:
        by_prompt: shuffle prompts and keep all rows of one side by side, for them to fall into one global batch.
    """
    if not by_prompt:
        together = index.rows_per_pair
        order = epoch_order(index.num_rows // together, seed=seed, epoch=epoch)
        return (order[:, None] * together + np.arange(together)).reshape(-1)
    starts = _run_starts(index.group)
    sizes = np.diff(starts, append=index.num_rows)
    order = epoch_order(len(starts), seed=seed, epoch=epoch)
    before = np.cumsum(sizes[order]) - sizes[order]
    return np.repeat(starts[order] - before, sizes[order]) + np.arange(index.num_rows)


def _run_starts(group_N: np.ndarray) -> np.ndarray:
    """Find where rows of another prompt than the row before begin -> [runs] places."""
    return np.flatnonzero(np.diff(group_N, prepend=-1))


@dataclass(frozen=True, kw_only=True)
class Units:
    """What is to be put into micro-batches."""

    rows: list[np.ndarray]
    """[U] arrays of rows of the training index."""
    num_tokens: np.ndarray
    """[U] int64, padding of documents included."""
    cost: np.ndarray
    """[U] float64, see `document_cost`."""


def step_units(
    rows: np.ndarray,
    lengths_N: np.ndarray,
    *,
    rows_per_loss: int,
    document_multiple: int = 1,
    crossover_length: float = np.inf,
) -> Units:
    """Make units of single rows, or of pairs -> Units, in the order of the rows.

    Args:
        rows: the rows of the global batch, the rows of a unit side by side.
        lengths_N: tokens of every row of the training index, looked up by row.
        rows_per_loss: 1, or 2 where a pair must share a micro-batch.
        document_multiple: each document's length is rounded up to it.
        crossover_length: see `document_cost`; infinite: tokens are the cost.
    """
    units = np.asarray(rows).reshape(-1, rows_per_loss)
    lengths = -(-np.asarray(lengths_N)[units] // document_multiple) * document_multiple
    return Units(
        rows=list(units),
        num_tokens=lengths.sum(axis=1),
        cost=document_cost(lengths, crossover_length=crossover_length).sum(axis=1),
    )


def shared_prompt_units(
    index: TrainingIndex,
    rows: np.ndarray,
    *,
    rows_per_loss: int,
    capacity: int,
    crossover_length: float,
    num_split: int = 0,
) -> Units:
    """Make units of neighbouring rows of one prompt, as many as a micro-batch holds behind one copy of it -> Units.

    Args:
        capacity: tokens of a micro-batch.
        num_split: this many prompts, the shortest, have a unit for each row (or pair) in place of one for all.
    """
    rows = np.asarray(rows)
    starts = _run_starts(index.group[rows])
    length_P = index.prompt_lengths[rows[starts]]
    is_split = np.zeros(len(starts), dtype=bool)
    is_split[np.argsort(length_P, kind="stable")[:num_split]] = True
    is_too_long = ~is_split & (np.add.reduceat(index.response_lengths[rows], starts) > capacity - length_P)
    size_P = np.diff(starts, append=len(rows))
    place_in_prompt = np.arange(len(rows)) - np.repeat(starts, size_P)
    begins_unit = (place_in_prompt == 0) | (np.repeat(is_split, size_P) & (place_in_prompt % rows_per_loss == 0))
    ordered = rows.copy()
    for prompt in np.flatnonzero(is_too_long).tolist():
        begin = int(starts[prompt])
        members = rows[begin : begin + int(size_P[prompt])]
        budget = capacity - int(length_P[prompt])
        for part in pack(index.response_lengths[members], budget=budget, rows_per_loss=rows_per_loss):
            ordered[begin : begin + len(part)] = members[np.sort(part)]
            begins_unit[begin] = True
            begin += len(part)
    first = np.flatnonzero(begins_unit)
    prompt_N, response_N = index.prompt_lengths[ordered], index.response_lengths[ordered]
    prompt_U = prompt_N[first]
    behind_N = document_cost(response_N, crossover_length=crossover_length, context_N=prompt_N)
    return Units(
        rows=cut(ordered, np.diff(first, append=len(ordered))),
        num_tokens=prompt_U + np.add.reduceat(response_N, first),
        cost=document_cost(prompt_U, crossover_length=crossover_length) + np.add.reduceat(behind_N, first),
    )


def packed_tokens(
    index: TrainingIndex, rows: np.ndarray, *, share_prompts: bool = False, document_multiple: int = 1
) -> int:
    """Count the tokens of rows laid end to end -> int.

    Args:
        share_prompts: neighbouring rows of one prompt lie behind one copy of it; goes with no `document_multiple`.
        document_multiple: each document's length is rounded up to it.
    """
    (num_tokens,) = tokens_of_parts(index, [rows], share_prompts=share_prompts, document_multiple=document_multiple)
    return int(num_tokens)


def tokens_of_parts(
    index: TrainingIndex, parts: Sequence[np.ndarray], *, share_prompts: bool = False, document_multiple: int = 1
) -> np.ndarray:
    """Count the tokens of each of several micro-batches as `packed_tokens` -> [parts] int64."""
    bounds = np.cumsum([0, *map(len, parts)])
    rows = np.concatenate([*parts, np.empty(0, dtype=np.int64)])
    if share_prompts:
        assert document_multiple == 1
        again = follows_its_prompt(index, rows, bounds)
        tokens = index.response_lengths[rows] + np.where(again, 0, index.prompt_lengths[rows])
    else:
        tokens = -(-index.lengths[rows] // document_multiple) * document_multiple
    before = np.concatenate([[0], np.cumsum(tokens)])
    return before[bounds[1:]] - before[bounds[:-1]]


def follows_its_prompt(index: TrainingIndex, rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Tell the rows that lie behind the prompt of the row before -> [len(rows)] bool.

    Args:
        bounds: where each micro-batch begins in `rows`, and where the last one ends.
    """
    again = np.diff(index.group[rows], prepend=-1) == 0
    again[bounds[bounds < len(rows)]] = False
    return again


def divide_step(
    units: Units,
    *,
    data_parallel_size: int,
    count_multiple: int = 1,
    micro_batch_size: int | None = None,
    packed_sequence_size: int | None = None,
) -> list[list[np.ndarray]]:
    """Share a step's units out over ranks and micro-batches -> one list of row arrays per data-parallel rank.

    Best-fit decreasing says how few micro-batches a rank can do with. Over that many, the units are spread by cost,
    costliest first, each to the cheapest micro-batch with room; where the micro-batches are too full for that, they
    stay as best-fit decreasing left them. They go to the ranks in the same manner, costliest first.

    Every rank gets the same number of micro-batches, costliest first. The loss is normalised by sequences of the global
    batch, so uneven micro-batches are exact. A global batch cut short by the end of an epoch is trained on, never
    dropped. Micro-batches are empty (length 0) only where there are fewer units than micro-batches; `collate` makes one
    of padding alone from such, with B = 0.

    Args:
        count_multiple: a rank's number of micro-batches is rounded up to it (the interleaved pipeline schedule).
        micro_batch_size: most rows of a micro-batch.
        packed_sequence_size: most tokens of a micro-batch. Exactly one of the two is given.
    """
    assert (micro_batch_size is None) != (packed_sequence_size is None) and len(units.rows) > 0
    if packed_sequence_size is None:
        size_U, capacity = np.array([len(rows) for rows in units.rows]), int(micro_batch_size or 0)
    else:
        size_U, capacity = units.num_tokens, packed_sequence_size
    shares = _divide_units(
        units.cost, size_U, capacity=capacity, num_ranks=data_parallel_size, count_multiple=count_multiple
    )
    return _rows_of(units, shares)


def divide_shared_step(
    index: TrainingIndex,
    rows: np.ndarray,
    *,
    data_parallel_size: int,
    packed_sequence_size: int,
    rows_per_loss: int,
    crossover_length: float,
    count_multiple: int = 1,
) -> list[list[np.ndarray]]:
    """Share a step out as `divide_step`, prompts computed once for their rows -> row arrays per data-parallel rank.

    Whole prompts are few and large, and uneven ranks wait for the busiest. So some of them, the shortest, are split:
    none, half as many as there are ranks, as many, twice, ... or all; until the busiest rank has hardly more to do than
    the mean, or else whatever leaves it least. Rows of one prompt that meet in a micro-batch are side by side.
    """
    num_prompts = len(_run_starts(index.group[rows]))
    num_split, least, best = 0, np.inf, None
    while num_split <= num_prompts:
        units = shared_prompt_units(
            index,
            rows,
            rows_per_loss=rows_per_loss,
            capacity=packed_sequence_size,
            crossover_length=crossover_length,
            num_split=num_split,
        )
        shares = _divide_units(
            units.cost,
            units.num_tokens,
            capacity=packed_sequence_size,
            num_ranks=data_parallel_size,
            count_multiple=count_multiple,
        )
        busiest = float(_sums(units.cost, [np.concatenate(rank) for rank in shares]).max())
        if busiest < least:
            least, best = busiest, (units, shares)
        if busiest * data_parallel_size <= _EVEN * units.cost.sum():
            break
        following = max(2 * num_split, -(-data_parallel_size // 2))
        num_split = num_prompts if num_split < num_prompts < following else following
    assert best is not None
    return _rows_of(*best, group_N=index.group)


def _divide_units(
    cost_U: np.ndarray, size_U: np.ndarray, *, capacity: int, num_ranks: int, count_multiple: int
) -> list[list[np.ndarray]]:
    """Share units out as `divide_step` says -> for each rank, the units of its micro-batches."""
    num_needed = count_packs(size_U, budget=capacity)
    num_micro_batches = -(-num_needed // (num_ranks * count_multiple)) * count_multiple
    num_packs = num_micro_batches * num_ranks
    packs = spread_by_cost(cost_U, num_bins=num_packs, capacity=capacity, size_I=size_U)
    if packs is None:
        packs = pack(size_U, budget=capacity)
        packs += [np.empty(0, dtype=np.int64)] * (num_packs - len(packs))
    return [[packs[item] for item in rank] for rank in assign_to_ranks(_sums(cost_U, packs), num_ranks=num_ranks)]


def _sums(values: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Add up the values of each part's members -> [parts], each to the bit what `values[part].sum()` is."""
    size_P = np.array([len(part) for part in parts])
    sums = np.zeros(len(parts))
    for size in np.unique(size_P).tolist():
        alike = np.flatnonzero(size_P == size).tolist()
        sums[alike] = values[np.stack([parts[part] for part in alike])].sum(axis=1)
    return sums


def _rows_of(
    units: Units, shares: list[list[np.ndarray]], *, group_N: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Put the rows in the units' places -> row arrays; with `group_N`, those of one prompt side by side in each."""
    parts = [part for rank in shares for part in rank]
    unit = np.concatenate(parts)
    size_of_unit = np.array([len(rows) for rows in units.rows])
    first_of_unit, size = np.cumsum(size_of_unit) - size_of_unit, size_of_unit[unit]
    behind = np.cumsum(size)
    rows = np.concatenate(units.rows)[np.repeat(first_of_unit[unit] - (behind - size), size) + np.arange(size.sum())]
    num_rows = np.diff(np.concatenate([[0], behind])[np.cumsum([0, *map(len, parts)])])
    if group_N is not None:
        rows = rows[np.lexsort((group_N[rows], np.repeat(np.arange(len(parts)), num_rows)))]
    found = iter(cut(rows, num_rows))
    return [[next(found) for _ in rank] for rank in shares]
