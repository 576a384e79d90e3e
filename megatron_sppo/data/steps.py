"""Which rows an epoch visits in which order, and which of a step's rows share a micro-batch.

N = rows, U = units of a step: what a micro-batch takes whole (a row, a pair, or rows of one prompt that share it).
No randomness but `epoch_order`; no process groups: the caller says how many data-parallel ranks there are.
"""

from dataclasses import dataclass

import numpy as np

from megatron_sppo.data.packing import assign_to_ranks, document_cost, pack, spread_by_cost
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
    starts = np.flatnonzero(np.diff(index.group, prepend=-1))
    sizes = np.diff(starts, append=index.num_rows)
    order = epoch_order(len(starts), seed=seed, epoch=epoch)
    before = np.cumsum(sizes[order]) - sizes[order]
    return np.repeat(starts[order] - before, sizes[order]) + np.arange(index.num_rows)


def _runs(group_N: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Cut rows where the next one is of another prompt -> the rows of each run."""
    return np.split(rows, np.flatnonzero(np.diff(group_N[rows])) + 1)


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
    prompts = _runs(index.group, np.asarray(rows))
    length = np.array([int(index.prompt_lengths[members[0]]) for members in prompts])
    split = set(np.argsort(length, kind="stable")[:num_split].tolist())
    found: list[np.ndarray] = []
    for number, members in enumerate(prompts):
        parts = list(np.arange(len(members)).reshape(-1, rows_per_loss))
        budget = capacity - int(length[number])
        if number not in split and index.response_lengths[members].sum() <= budget:
            parts = [np.arange(len(members))]
        elif number not in split:
            parts = pack(index.response_lengths[members], budget=budget, rows_per_loss=rows_per_loss)
        found += [members[np.sort(part)] for part in parts]
    ordered = np.concatenate(found)
    first = np.cumsum([0, *(len(members) for members in found[:-1])])
    prompt_N, response_N = index.prompt_lengths[ordered], index.response_lengths[ordered]
    prompt_U = prompt_N[first]
    behind_N = document_cost(response_N, crossover_length=crossover_length, context_N=prompt_N)
    return Units(
        rows=found,
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
    if not share_prompts:
        return int((-(-index.lengths[rows] // document_multiple) * document_multiple).sum())
    assert document_multiple == 1
    prompts = [index.prompt_lengths[run[0]] for run in _runs(index.group, rows) if len(run)]
    return int(index.response_lengths[rows].sum() + sum(prompts))


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
    num_prompts = len(_runs(index.group, rows))
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
        busiest = max(float(units.cost[np.concatenate(rank)].sum()) for rank in shares)
        if busiest < least:
            least, best = busiest, _rows_of(units, shares)
        if busiest * data_parallel_size <= _EVEN * units.cost.sum():
            break
        following = max(2 * num_split, -(-data_parallel_size // 2))
        num_split = num_prompts if num_split < num_prompts < following else following
    assert best is not None
    return [[part[np.argsort(index.group[part], kind="stable")] for part in rank] for rank in best]


def _divide_units(
    cost_U: np.ndarray, size_U: np.ndarray, *, capacity: int, num_ranks: int, count_multiple: int
) -> list[list[np.ndarray]]:
    """Share units out as `divide_step` says -> for each rank, the units of its micro-batches."""
    packs = pack(size_U, budget=capacity)
    num_micro_batches = -(-len(packs) // (num_ranks * count_multiple)) * count_multiple
    num_packs = num_micro_batches * num_ranks
    even = spread_by_cost(cost_U, num_bins=num_packs, capacity=capacity, size_I=size_U)
    if even is not None:
        packs = even
    packs += [np.empty(0, dtype=np.int64)] * (num_packs - len(packs))
    pack_cost = np.array([cost_U[members].sum() for members in packs])
    return [[packs[item] for item in rank] for rank in assign_to_ranks(pack_cost, num_ranks=num_ranks)]


def _rows_of(units: Units, shares: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Put the rows in the units' places."""
    nothing = np.empty(0, dtype=np.int64)
    return [[np.concatenate([nothing, *(units.rows[unit] for unit in part)]) for part in rank] for rank in shares]
