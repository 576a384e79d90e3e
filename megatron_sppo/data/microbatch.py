"""From training rows to micro-batches: which rows go together, and the tensors of one micro-batch.

N = training rows, b = batch rows of a tensor, S = tokens of each (b = 1 when packed), B = sequences, R = response
tokens.
No randomness but `epoch_order`; no process groups: the caller says how many data-parallel ranks there are.
"""

import dataclasses
import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.selection import RowTargets, TrainingIndex
from megatron_sppo.zigzag import zigzag_positions

IGNORED_LABEL = -100


def epoch_order(num_units: int, *, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the units (rows, or pairs of rows) of an epoch -> [num_units] int64, a permutation.

    Sorts raw words of PCG64, whose stream numpy guarantees for ever; `Generator.permutation` may change with a release.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_units)
    return np.argsort(words, kind="stable")


def rows_of_units(units: np.ndarray, *, unit_size: int) -> np.ndarray:
    """Expand unit indices to row indices -> [len(units) * unit_size], the rows of a unit side by side."""
    return (np.asarray(units)[:, None] * unit_size + np.arange(unit_size)).reshape(-1)


def plan_step(
    rows: np.ndarray,
    lengths_N: np.ndarray,
    *,
    data_parallel_size: int,
    micro_batch_size: int,
    unit_size: int,
    multiple: int = 1,
) -> list[list[np.ndarray]]:
    """Share a global batch out over ranks and micro-batches -> one list of row arrays per data-parallel rank.

    Longest units first, each to the emptiest micro-batch with room (tokens balanced, at most `micro_batch_size` rows),
    then the micro-batches alike to the ranks. Every rank gets the same number of micro-batches, longest first. The loss
    is normalised by sequences of the global batch, so uneven micro-batches are exact.

    A global batch cut short by the end of an epoch is trained on, never dropped. Micro-batches are empty (length 0)
    only when there are fewer units than micro-batches; `collate` makes one of padding alone from such, with B = 0.

    Args:
        rows: the rows of the global batch, units side by side.
        lengths_N: tokens of every row of the training index, looked up by row.
        unit_size: 1, or 2 where a pair must share a micro-batch.
        multiple: of which each rank's number of micro-batches is one (interleaved pipelines: their stages).
    """
    assert len(rows) % unit_size == 0 and len(rows) > 0
    assert micro_batch_size % unit_size == 0, f"micro_batch_size {micro_batch_size} cannot hold units of {unit_size}"
    units = np.asarray(rows).reshape(-1, unit_size)
    cost = np.asarray(lengths_N)[units].sum(axis=1)
    num_micro_batches = -(-len(rows) // (data_parallel_size * micro_batch_size * multiple)) * multiple
    num_bins = data_parallel_size * num_micro_batches
    bins = _balance(cost, num_bins=num_bins, capacity=micro_batch_size // unit_size)
    bin_cost = np.array([cost[members].sum() for members in bins])
    ranks = _balance(bin_cost, num_bins=data_parallel_size, capacity=num_micro_batches)
    return [[units[bins[bin_index]].reshape(-1) for bin_index in rank] for rank in ranks]


def _balance(cost: np.ndarray, *, num_bins: int, capacity: int) -> list[list[int]]:
    """Longest processing time first, with room for `capacity` items a bin -> item indices per bin, longest first."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    open_bins = [(0, bin_index) for bin_index in range(num_bins)]
    for item in np.argsort(-cost, kind="stable"):
        load, bin_index = heapq.heappop(open_bins)
        bins[bin_index].append(int(item))
        if len(bins[bin_index]) < capacity:
            heapq.heappush(open_bins, (load + int(cost[item]), bin_index))
    return bins


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The tensors of one micro-batch, on one device.

    `response_rows` are rows of the hidden states in Megatron's [S, b, H] layout after `hidden.reshape(-1, H)`:
    s * b + i for position s of batch row i (just s when packed). Position s predicts the token at s + 1.
    """

    tokens: Tensor
    """[b, S] int64."""
    position_ids: Tensor
    """[b, S] int64, from 0 in each document."""
    labels: Tensor
    """[b, S] int64: the response token that follows each position, -100 where none does."""
    cu_seqlens: Tensor | None
    """[documents + 1] int32, packed only; padding at the end is a document of its own. None when padded."""
    max_seqlen: int
    """Tokens of the longest document (packed) or S (padded)."""
    response_rows: Tensor
    """[R] int64."""
    sequence_index: Tensor
    """[R] int64, the sequence in [0, B) that each response token belongs to; ascending."""
    labels_R: Tensor
    """[R] int64, the response tokens."""
    rows: Tensor
    """[B] int64, rows of the training index."""
    group: Tensor
    """[B] int64."""
    response: Tensor
    """[B] int64."""
    chosen: Tensor
    """[B] bool."""
    lengths: Tensor
    """[B] int64, tokens of prompt and response."""
    response_lengths: Tensor
    """[B] int64, tokens."""
    win_rate: Tensor
    """[B] float32; NaN where no targets were given. So are the next three."""
    log_z: Tensor
    """[B] float32, nats."""
    preference: Tensor
    """[B] float32."""
    reference_log_prob: Tensor
    """[B] float32, nats; NaN where not computed."""

    @property
    def num_sequences(self) -> int:
        """B; 0 for a micro-batch of padding alone."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Move every tensor -> a MicroBatch on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def sample_tokens(dataset: PreferenceDataset, index: TrainingIndex, row: int) -> tuple[np.ndarray, int]:
    """Join a row's prompt (cut to its end if too long) and response -> token ids, the number that are the prompt's."""
    group, num_prompt_tokens = int(index.group[row]), int(index.prompt_lengths[row])
    prompt = dataset.prompt(group)[-num_prompt_tokens:]
    return np.concatenate([prompt, dataset.response(group, int(index.response[row]))]), num_prompt_tokens


def collate(
    dataset: PreferenceDataset,
    index: TrainingIndex,
    rows: np.ndarray,
    *,
    packed: bool,
    length: int | None = None,
    multiple: int = 1,
    document_multiple: int = 1,
    num_batch_rows: int | None = None,
    targets: RowTargets | None = None,
    reference_GK: np.ndarray | None = None,
    pad_token_id: int = 0,
) -> MicroBatch:
    """Make the tensors of one micro-batch, on the CPU -> MicroBatch.

    Packed: the sequences end to end in one row. Padded: one sequence per row, padding on the right, where causal
    attention never sees it. No rows at all: one row of padding, so that every rank has something to pass through the
    pipeline.

    Args:
        length: S exactly; None: as short as the rows allow.
        multiple: S is rounded up to it (tensor parallelism, context parallelism, FP8).
        document_multiple: each document is padded at its end to a multiple of it, where no real token sees the padding
            (2 x the context-parallel ranks); divides `multiple`.
        num_batch_rows: b when padded, rows of padding added (pipeline stages want one shape); None: one row a sequence.
        reference_GK: [G, K], from `read_reference`.
    """
    rows = np.asarray(rows, dtype=np.int64)
    samples = [sample_tokens(dataset, index, int(row)) for row in rows]
    assert multiple % document_multiple == 0
    sizes = [-(-len(tokens) // document_multiple) * document_multiple for tokens, _ in samples]
    needed = max(sum(sizes) if packed else max(sizes, default=0), 1)
    num_columns = -(-needed // multiple) * multiple if length is None else length
    assert needed <= num_columns and num_columns % multiple == 0, (
        f"{needed} tokens, length {num_columns}, multiple {multiple}"
    )
    num_batch_rows = 1 if packed else max(len(rows), 1, num_batch_rows or 1)
    tokens = np.full((num_batch_rows, num_columns), pad_token_id, dtype=np.int64)
    labels = np.full((num_batch_rows, num_columns), IGNORED_LABEL, dtype=np.int64)
    position_ids = np.tile(np.arange(num_columns), (num_batch_rows, 1))
    response_rows, start = [], 0
    for sequence, (sample, num_prompt_tokens) in enumerate(samples):
        batch_row, begin = (0, start) if packed else (sequence, 0)
        end = begin + len(sample)
        tokens[batch_row, begin:end] = sample
        position_ids[batch_row, begin : begin + sizes[sequence]] = np.arange(sizes[sequence])
        predicting = np.arange(begin + num_prompt_tokens - 1, end - 1)
        labels[batch_row, predicting] = sample[num_prompt_tokens:]
        response_rows.append(predicting * num_batch_rows + batch_row)
        start += sizes[sequence]
    if packed:
        position_ids[0, start:] = np.arange(num_columns - start)
    bounds = np.cumsum([0, *sizes, *([num_columns - start] if start < num_columns else [])])
    response_lengths = index.response_lengths[rows]
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(labels),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)) if packed else None,
        max_seqlen=int(np.diff(bounds).max()) if packed else num_columns,
        response_rows=torch.from_numpy(_joined(response_rows)),
        sequence_index=torch.from_numpy(np.repeat(np.arange(len(rows)), response_lengths)),
        labels_R=torch.from_numpy(_joined([sample[prompt:].astype(np.int64) for sample, prompt in samples])),
        rows=torch.from_numpy(rows),
        group=torch.from_numpy(index.group[rows]),
        response=torch.from_numpy(index.response[rows]),
        chosen=torch.from_numpy(index.chosen[rows]),
        lengths=torch.from_numpy(index.lengths[rows]),
        response_lengths=torch.from_numpy(response_lengths),
        win_rate=_float_rows(None if targets is None else targets.win_rate[rows], len(rows)),
        log_z=_float_rows(None if targets is None else targets.log_z[rows], len(rows)),
        preference=_float_rows(None if targets is None else targets.preference[rows], len(rows)),
        reference_log_prob=_float_rows(
            None if reference_GK is None else reference_GK[index.group[rows], index.response[rows]], len(rows)
        ),
    )


def context_parallel_share(batch: MicroBatch, *, rank: int, size: int) -> MicroBatch:
    """Keep one context-parallel rank's tokens of a micro-batch (zigzag) -> MicroBatch with S / size columns.

    `cu_seqlens` and `max_seqlen` still describe the whole row, as Transformer Engine wants them. A response token goes
    to the rank that holds the position before it, so every rank has partial sums of every sequence.
    """
    num_columns, num_batch_rows = batch.tokens.shape[1], batch.tokens.shape[0]
    boundaries = torch.tensor([0, num_columns]) if batch.cu_seqlens is None else batch.cu_seqlens
    position = zigzag_positions(boundaries, rank=rank, size=size)
    column_of = torch.full((num_columns,), -1, dtype=torch.int64)
    column_of[position] = torch.arange(len(position))
    column = column_of[batch.response_rows // num_batch_rows]
    here = column >= 0
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[:, position],
        position_ids=batch.position_ids[:, position],
        labels=batch.labels[:, position],
        response_rows=column[here] * num_batch_rows + batch.response_rows[here] % num_batch_rows,
        sequence_index=batch.sequence_index[here],
        labels_R=batch.labels_R[here],
    )


def packed_attention_mask(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Make the block-diagonal causal mask of a packed row -> [1, 1, S, S] bool, True = masked.

    For attention that knows no cu_seqlens.
    """
    position = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
    visible = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    return ~visible[None, None]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _float_rows(values: np.ndarray | None, num_rows: int) -> Tensor:
    if values is None:
        return torch.full((num_rows,), torch.nan)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
