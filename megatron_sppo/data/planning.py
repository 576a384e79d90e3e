"""Which rows an epoch visits in which order, and which of a step's rows share a micro-batch.

N = rows, U = units of a step: what a micro-batch takes whole (a row, a pair, or rows of one prompt that share it).
No randomness but `epoch_order`; no process groups: the caller says how many data-parallel ranks there are.
"""

from dataclasses import dataclass

import numpy as np

from megatron_sppo.data.packing import balance, document_cost, pack
from megatron_sppo.data.selection import TrainingIndex


def epoch_order(num_units: int, *, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the units (rows, pairs or prompts) of an epoch -> [num_units] int64, a permutation.

    Sorts raw words of PCG64, whose stream numpy guarantees for ever; `Generator.permutation` may change with a release.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_units)
    return np.argsort(words, kind="stable")


def rows_of_units(units: np.ndarray, *, unit_size: int) -> np.ndarray:
    """Expand unit indices to row indices -> [len(units) * unit_size], the rows of a unit side by side."""
    return (np.asarray(units)[:, None] * unit_size + np.arange(unit_size)).reshape(-1)


def epoch_rows(index: TrainingIndex, *, seed: int, epoch: int, by_prompt: bool) -> np.ndarray:
    """List an epoch's rows in the order in which they are trained on -> [N] int64, pairs side by side.

    Args:
        by_prompt: shuffle prompts and keep all rows of one side by side, for them to fall into one global batch.
    """
    if not by_prompt:
        order = epoch_order(index.num_rows // index.unit_size, seed=seed, epoch=epoch)
        return rows_of_units(order, unit_size=index.unit_size)
    prompts = _runs(index.group, np.arange(index.num_rows))
    return np.concatenate([prompts[i] for i in epoch_order(len(prompts), seed=seed, epoch=epoch)])


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
    index: TrainingIndex, rows: np.ndarray, *, unit_size: int, document_multiple: int, parity_length: float
) -> Units:
    """Make units of single rows, or of pairs -> Units, in the order of the rows.

    Args:
        rows: the rows of the global batch, the rows of a unit side by side.
        unit_size: 1, or 2 where a pair must share a micro-batch.
        document_multiple: each document's length is rounded up to it.
        parity_length: see `document_cost`.
    """
    units = np.asarray(rows).reshape(-1, unit_size)
    lengths = -(-index.lengths[units] // document_multiple) * document_multiple
    return Units(
        rows=list(units),
        num_tokens=lengths.sum(axis=1),
        cost=document_cost(lengths, parity_length=parity_length).sum(axis=1),
    )


def shared_prompt_units(
    index: TrainingIndex, rows: np.ndarray, *, unit_size: int, capacity: int, parity_length: float
) -> Units:
    """Make units of neighbouring rows of one prompt, as many as a micro-batch holds behind one copy of it -> Units.

    Args:
        capacity: tokens of a micro-batch.
    """
    found: list[np.ndarray] = []
    cost: list[float] = []
    for members in _runs(index.group, np.asarray(rows)):
        prompt = int(index.prompt_lengths[members[0]])
        for part in pack(index.response_lengths[members], budget=capacity - prompt, unit_size=unit_size):
            responses = index.response_lengths[members[part]]
            found.append(members[np.sort(part)])
            behind = document_cost(responses, parity_length=parity_length, context_N=prompt).sum()
            cost.append(float(document_cost(prompt, parity_length=parity_length) + behind))
    num_tokens = [packed_tokens(index, members, share_prompts=True) for members in found]
    return Units(rows=found, num_tokens=np.array(num_tokens, dtype=np.int64), cost=np.array(cost))


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


def plan_step(
    units: Units,
    *,
    data_parallel_size: int,
    micro_batch_size: int | None = None,
    packed_sequence_size: int | None = None,
    multiple: int = 1,
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
        micro_batch_size: most rows of a micro-batch.
        packed_sequence_size: most tokens of a micro-batch. Exactly one of the two is given.
        multiple: of which each rank's number of micro-batches is one (interleaved pipelines: their stages).
    """
    assert (micro_batch_size is None) != (packed_sequence_size is None) and len(units.rows) > 0
    if packed_sequence_size is None:
        size_U, capacity = np.array([len(rows) for rows in units.rows]), int(micro_batch_size or 0)
    else:
        size_U, capacity = units.num_tokens, packed_sequence_size
    packs = pack(size_U, budget=capacity)
    num_micro_batches = -(-len(packs) // (data_parallel_size * multiple)) * multiple
    num_packs = num_micro_batches * data_parallel_size
    even = balance(units.cost, num_bins=num_packs, capacity=capacity, size_I=size_U)
    if even is None:
        even = packs + [np.empty(0, dtype=np.int64)] * (num_packs - len(packs))
    pack_cost = np.array([units.cost[members].sum() for members in even])
    ranks = balance(pack_cost, num_bins=data_parallel_size, capacity=num_micro_batches)
    assert ranks is not None
    nothing = np.empty(0, dtype=np.int64)
    return [[np.concatenate([nothing, *(units.rows[unit] for unit in even[item])]) for item in rank] for rank in ranks]
