"""The tensors of one micro-batch, from the rows that `steps` put into it.

N = training rows, b = batch rows of a tensor, S = tokens of each (b = 1 when packed), B = sequences, R = response
tokens.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.selection import TrainingIndex
from megatron_sppo.objective import Targets


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The tensors of one micro-batch, on one device.

    `response_rows` are rows of the hidden states in Megatron's [S, b, H] layout after `hidden.reshape(-1, H)`:
    s * b + i for position s of batch row i (just s when packed). Position s predicts the token at s + 1; the end of
    a shared prompt predicts the first token of each of its responses.
    """

    tokens: Tensor
    """[b, S] int64."""
    position_ids: Tensor
    """[b, S] int64, from 0 in each sequence."""
    cu_seqlens: Tensor | None
    """[documents + 1] int32, packed only; padding at the end is a document of its own. None when padded."""
    parents: Tensor | None
    """[documents] int32, with shared prompts only: the document that each one continues (a response its prompt), which
    it sees too; -1 where it begins a sequence."""
    max_seqlen: int
    """Tokens of the longest sequence (packed) or S (padded)."""
    num_tokens: int
    """Tokens that are no padding; of the whole micro-batch where ranks divide its columns."""
    response_rows: Tensor
    """[R] int64."""
    sequence_index: Tensor
    """[R] int64, the sequence in [0, B) that each response token belongs to; ascending, or (`in_order_of_ranks`) so for
    each rank."""
    labels_R: Tensor
    """[R] int64, the response tokens."""
    rows: Tensor
    """[B] int64, rows of the training index."""
    lengths: Tensor
    """[B] int64, tokens of prompt and response."""
    targets: Targets
    """[B]."""
    rows_of_ranks: tuple[int, ...] | None = None
    """Under sequence parallelism: how many of `response_rows` lie on each rank; see `in_order_of_ranks`."""

    @property
    def num_sequences(self) -> int:
        """B; 0 for a micro-batch of padding alone."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Move every tensor -> a MicroBatch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """Lay every tensor into page-locked memory, from where `to` a GPU makes nobody wait -> a MicroBatch."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        changed: dict[str, Any] = {"targets": self.targets.each(change)}
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                changed[field.name] = change(value)
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True, kw_only=True)
class _Documents:
    """Stretches of tokens, each seeing itself and all of the document that it continues: prompt and response, or one.

    D = documents, B = rows. Without shared prompts there is a document a row.
    """

    tokens: np.ndarray
    """Of all documents, end to end."""
    labels_R: np.ndarray
    length_D: np.ndarray
    parent_D: np.ndarray
    """Number of the document that each one continues; -1: none."""
    prompt_B: np.ndarray
    """The document with each row's prompt."""
    response_B: np.ndarray
    """The document with each row's response."""


def _documents(
    dataset: PreferenceDataset, index: TrainingIndex, rows: np.ndarray, *, share_prompts: bool
) -> _Documents:
    """Cut rows into documents: one a row; or the prompt of neighbouring rows, and one for each response."""
    group = index.group[rows]
    opens = np.diff(group, prepend=-1) != 0 if share_prompts else np.ones(len(rows), dtype=bool)
    # [B, 2] parts, a prompt and a response, of which prompts that are there already are left out.
    part = np.stack([np.zeros_like(group), 1 + index.response[rows]], axis=1)
    length = np.stack([index.prompt_lengths[rows], index.response_lengths[rows]], axis=1)
    taken = np.stack([opens, np.ones_like(opens)], axis=1)
    length_S = length[taken]
    tokens = dataset.gather_tokens(np.repeat(group, 2).reshape(-1, 2)[taken], part[taken], length_S)
    labels_R = tokens[np.repeat(part[taken] > 0, length_S)]
    if not share_prompts:
        one_B = np.arange(len(rows))
        return _Documents(
            tokens=tokens,
            labels_R=labels_R,
            length_D=length.sum(axis=1),
            parent_D=np.full(len(rows), -1),
            prompt_B=one_B,
            response_B=one_B,
        )
    document = np.cumsum(taken.reshape(-1)).reshape(-1, 2) - 1
    response_B = document[:, 1]
    prompt_B = np.maximum.accumulate(np.where(opens, document[:, 0], 0))
    parent_D = np.full(len(length_S), -1)
    parent_D[response_B] = prompt_B
    return _Documents(
        tokens=tokens,
        labels_R=labels_R,
        length_D=length_S,
        parent_D=parent_D,
        prompt_B=prompt_B,
        response_B=response_B,
    )


def collate(
    dataset: PreferenceDataset,
    index: TrainingIndex,
    rows: np.ndarray,
    *,
    targets: Targets,
    packed: bool,
    share_prompts: bool = False,
    length: int | None = None,
    multiple: int = 1,
    document_multiple: int = 1,
    num_batch_rows: int | None = None,
) -> MicroBatch:
    """Make the tensors of one micro-batch, on the CPU -> MicroBatch.

    Packed: the sequences end to end in one row. Padded: one sequence per row, padding on the right, where causal
    attention never sees it. No rows at all: one row of padding, so that every rank has something to pass through the
    pipeline.

    Args:
        targets: of these rows.
        share_prompts: lay neighbouring rows of one prompt behind one copy of it; packed only. The last position of the
            prompt then predicts the first token of each response.
        length: S exactly; None: as short as the rows allow.
        multiple: S is rounded up to it.
        document_multiple: each document is padded at its end to a multiple of it, where no real token sees the padding;
            divides `multiple`; 1 where prompts are shared.
        num_batch_rows: b when padded, rows of padding added (pipeline stages want one shape); None: one row a sequence.
    """
    rows = np.asarray(rows, dtype=np.int64)
    assert len(targets.win_rate) == len(rows) and multiple % document_multiple == 0
    assert not share_prompts or (packed and document_multiple == 1)
    documents = _documents(dataset, index, rows, share_prompts=share_prompts)
    size_D = -(-documents.length_D // document_multiple) * document_multiple
    needed = max(int(size_D.sum() if packed else size_D.max(initial=0)), 1)
    num_columns = -(-needed // multiple) * multiple if length is None else length
    assert needed <= num_columns and num_columns % multiple == 0, (
        f"{needed} tokens, length {num_columns}, multiple {multiple}"
    )
    num_batch_rows = 1 if packed else max(len(rows), 1, num_batch_rows or 1)
    bounds, parents = np.concatenate([[0], np.cumsum(size_D)]), documents.parent_D
    begin_D = bounds[:-1] if packed else np.arange(len(rows)) * num_columns
    tokens = np.zeros(num_batch_rows * num_columns, dtype=np.int64)
    tokens[_spread(begin_D, documents.length_D)] = documents.tokens
    if packed and bounds[-1] < num_columns:
        bounds, parents = np.append(bounds, num_columns), np.append(parents, -1)
    position_ids = _packed_positions(bounds, parents, documents.length_D) if packed else np.arange(num_columns)
    return MicroBatch(
        tokens=torch.from_numpy(tokens.reshape(num_batch_rows, num_columns)),
        position_ids=torch.from_numpy(np.tile(position_ids, (num_batch_rows, 1))),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)) if packed else None,
        parents=torch.from_numpy(parents.astype(np.int32)) if share_prompts else None,
        max_seqlen=int(position_ids.max()) + 1 if packed else num_columns,
        num_tokens=int(documents.length_D.sum()),
        response_rows=torch.from_numpy(
            _predicting(documents, begin_D, index, rows, shape=(num_batch_rows, num_columns))
        ),
        sequence_index=torch.from_numpy(np.repeat(np.arange(len(rows)), index.response_lengths[rows])),
        labels_R=torch.from_numpy(documents.labels_R.astype(np.int64)),
        rows=torch.from_numpy(rows),
        lengths=torch.from_numpy(index.lengths[rows]),
        targets=targets,
    )


def _spread(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """List the places of stretches, one after another: begin, begin + 1, ... of each -> [sum of length]."""
    return np.repeat(begin - (np.cumsum(length) - length), length) + np.arange(length.sum())


def _packed_positions(bounds: np.ndarray, parents: np.ndarray, length_D: np.ndarray) -> np.ndarray:
    """Number the columns of each document from 0, or on from the one that it continues -> [S]."""
    before = np.zeros(len(parents), dtype=np.int64)
    before[parents >= 0] = length_D[parents[parents >= 0]]
    return _spread(before, np.diff(bounds))


def _predicting(
    documents: _Documents, begin_D: np.ndarray, index: TrainingIndex, rows: np.ndarray, *, shape: tuple[int, int]
) -> np.ndarray:
    """Find the position that predicts each response token -> [R], see `MicroBatch.response_rows`.

    Args:
        begin_D: place of each document's first token in the [b, S] tensor, row after row.
    """
    num_prompt_tokens, num_response_tokens = index.prompt_lengths[rows], index.response_lengths[rows]
    last_of_prompt = begin_D[documents.prompt_B] + num_prompt_tokens - 1
    end = begin_D[documents.response_B] + documents.length_D[documents.response_B]
    place_R = _spread(end - num_response_tokens - 1, num_response_tokens)
    place_R[np.cumsum(num_response_tokens) - num_response_tokens] = last_of_prompt
    return place_R % shape[1] * shape[0] + place_R // shape[1]


def in_order_of_ranks(batch: MicroBatch, *, size: int) -> MicroBatch:
    """Order the response tokens by the sequence-parallel rank that holds their hidden states -> MicroBatch.

    Megatron gives each of `size` ranks as many neighbouring positions. The counts are taken here, on the CPU, since the
    ranks send each other that many rows and the host would wait for a GPU's answer.
    """
    rank_R = batch.response_rows // (batch.tokens.numel() // size)
    order = torch.argsort(rank_R, stable=True)
    return dataclasses.replace(
        batch,
        response_rows=batch.response_rows[order],
        sequence_index=batch.sequence_index[order],
        labels_R=batch.labels_R[order],
        rows_of_ranks=tuple(torch.bincount(rank_R, minlength=size).tolist()),
    )
