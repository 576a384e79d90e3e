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


def sample_tokens(dataset: PreferenceDataset, index: TrainingIndex, row: int) -> tuple[np.ndarray, int]:
    """Join a row's prompt (cut to its end if too long) and response -> token ids, the number that are the prompt's."""
    group, num_prompt_tokens = int(index.group[row]), int(index.prompt_lengths[row])
    prompt = dataset.prompt(group)[-num_prompt_tokens:]
    return np.concatenate([prompt, dataset.response(group, int(index.response[row]))]), num_prompt_tokens


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A stretch of tokens that sees itself and all of the document that it continues: prompt and response, or one."""

    tokens: np.ndarray
    num_prompt_tokens: int
    """How many of `tokens` are the prompt's: all of them where the responses lie in documents of their own."""
    parent: int = -1
    """Number of the document that this one continues; -1: none."""

    @property
    def response(self) -> np.ndarray:
        return self.tokens[self.num_prompt_tokens :]


def _documents(
    dataset: PreferenceDataset, index: TrainingIndex, rows: np.ndarray, *, share_prompts: bool
) -> list[_Document]:
    """Cut rows into documents: one a row; or the prompt of neighbouring rows, and one for each response."""
    found: list[_Document] = []
    prompt, group = -1, None
    for row in rows:
        sample, num_prompt_tokens = sample_tokens(dataset, index, int(row))
        if not share_prompts:
            found.append(_Document(tokens=sample, num_prompt_tokens=num_prompt_tokens))
            continue
        if group != index.group[row]:
            prompt, group = len(found), index.group[row]
            found.append(_Document(tokens=sample[:num_prompt_tokens], num_prompt_tokens=num_prompt_tokens))
        found.append(_Document(tokens=sample[num_prompt_tokens:], num_prompt_tokens=0, parent=prompt))
    return found


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
    sizes = [-(-len(document.tokens) // document_multiple) * document_multiple for document in documents]
    needed = max(sum(sizes) if packed else max(sizes, default=0), 1)
    num_columns = -(-needed // multiple) * multiple if length is None else length
    assert needed <= num_columns and num_columns % multiple == 0, (
        f"{needed} tokens, length {num_columns}, multiple {multiple}"
    )
    bounds, parents = np.cumsum([0, *sizes]), [document.parent for document in documents]
    starts = [(0, int(begin)) if packed else (number, 0) for number, begin in enumerate(bounds[:-1])]
    shape = (1 if packed else max(len(rows), 1, num_batch_rows or 1), num_columns)
    tokens, position_ids, response_rows = _lay_out(documents, starts, sizes, shape=shape)
    if packed and bounds[-1] < num_columns:
        position_ids[0, bounds[-1] :] = np.arange(num_columns - bounds[-1])
        bounds, parents = np.append(bounds, num_columns), [*parents, -1]
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)) if packed else None,
        parents=torch.tensor(parents, dtype=torch.int32) if share_prompts else None,
        max_seqlen=int(position_ids.max()) + 1 if packed else num_columns,
        num_tokens=sum(len(document.tokens) for document in documents),
        response_rows=torch.from_numpy(response_rows),
        sequence_index=torch.from_numpy(np.repeat(np.arange(len(rows)), index.response_lengths[rows])),
        labels_R=torch.from_numpy(_joined([document.response for document in documents])),
        rows=torch.from_numpy(rows),
        lengths=torch.from_numpy(index.lengths[rows]),
        targets=targets,
    )


def _lay_out(
    documents: list[_Document], starts: list[tuple[int, int]], sizes: list[int], *, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write documents into [b, S] arrays -> tokens, position_ids, response_rows.

    Args:
        starts: batch row and column of each document's first token.
        sizes: tokens of each document, its own padding included.
    """
    tokens, position_ids = np.zeros(shape, dtype=np.int64), np.tile(np.arange(shape[1]), (shape[0], 1))
    response_rows = []
    for document, (batch_row, begin), size in zip(documents, starts, sizes, strict=True):
        shared = document.parent >= 0
        before = len(documents[document.parent].tokens) if shared else 0
        position_ids[batch_row, begin : begin + size] = np.arange(before, before + size)
        end = begin + len(document.tokens)
        tokens[batch_row, begin:end] = document.tokens
        predicting = np.arange(begin + document.num_prompt_tokens - 1, end - 1)
        if shared:
            predicting[0] = starts[document.parent][1] + before - 1  # the prompt's last position
        response_rows.append(predicting * shape[0] + batch_row)
    return tokens, position_ids, _joined(response_rows)


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


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
