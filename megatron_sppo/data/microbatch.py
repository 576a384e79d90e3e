"""The tensors of one micro-batch, from the rows that `planning` put into it.

N = training rows, b = batch rows of a tensor, S = tokens of each (b = 1 when packed), B = sequences, R = response
tokens.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.selection import RowTargets, TrainingIndex

IGNORED_LABEL = -100


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
    labels: Tensor
    """[b, S] int64: the response token that follows each position, -100 where none does, or where several do (at the
    end of a shared prompt)."""
    cu_seqlens: Tensor | None
    """[documents + 1] int32, packed only; padding at the end is a document of its own. None when padded."""
    parents: Tensor | None
    """[documents] int32, with shared prompts only: the document that each one continues (a response its prompt), which
    it sees too; -1 where it begins a sequence."""
    max_seqlen: int
    """Tokens of the longest sequence (packed) or S (padded)."""
    num_tokens: int
    """Tokens that are no padding; of all context-parallel ranks together."""
    response_rows: Tensor
    """[R] int64."""
    sequence_index: Tensor
    """[R] int64, the sequence in [0, B) that each response token belongs to; ascending, or (`in_order_of_ranks`) so for
    each rank."""
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
        changed = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
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
    packed: bool,
    share_prompts: bool = False,
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
        share_prompts: lay neighbouring rows of one prompt behind one copy of it; packed only. The last position of the
            prompt then predicts the first token of each response.
        length: S exactly; None: as short as the rows allow.
        multiple: S is rounded up to it (tensor parallelism, context parallelism, FP8).
        document_multiple: each document is padded at its end to a multiple of it, where no real token sees the padding
            (2 x the context-parallel ranks, unless prompts are shared); divides `multiple`.
        num_batch_rows: b when padded, rows of padding added (pipeline stages want one shape); None: one row a sequence.
        reference_GK: [G, K], from `read_reference`.
    """
    rows = np.asarray(rows, dtype=np.int64)
    assert multiple % document_multiple == 0
    assert not share_prompts or (packed and document_multiple == 1)
    documents = _documents(dataset, index, rows, share_prompts=share_prompts)
    sizes = [-(-len(document.tokens) // document_multiple) * document_multiple for document in documents]
    needed = max(sum(sizes) if packed else max(sizes, default=0), 1)
    num_columns = -(-needed // multiple) * multiple if length is None else length
    assert needed <= num_columns and num_columns % multiple == 0, (
        f"{needed} tokens, length {num_columns}, multiple {multiple}"
    )
    shape = (1 if packed else max(len(rows), 1, num_batch_rows or 1), num_columns)
    bounds, parents = np.cumsum([0, *sizes]), [document.parent for document in documents]
    if bounds[-1] < num_columns:
        bounds, parents = np.append(bounds, num_columns), [*parents, -1]
    starts = [(0, int(begin)) if packed else (number, 0) for number, begin in enumerate(bounds[: len(documents)])]
    laid_out = _lay_out(documents, starts, sizes, shape=shape, pad_token_id=pad_token_id)
    if packed:
        laid_out["position_ids"][0, sum(sizes) :] = torch.arange(num_columns - sum(sizes))
    return MicroBatch(
        **laid_out,
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)) if packed else None,
        parents=torch.tensor(parents, dtype=torch.int32) if share_prompts else None,
        max_seqlen=int(laid_out["position_ids"].max()) + 1 if packed else num_columns,
        num_tokens=sum(len(document.tokens) for document in documents),
        sequence_index=torch.from_numpy(np.repeat(np.arange(len(rows)), index.response_lengths[rows])),
        rows=torch.from_numpy(rows),
        group=torch.from_numpy(index.group[rows]),
        response=torch.from_numpy(index.response[rows]),
        chosen=torch.from_numpy(index.chosen[rows]),
        lengths=torch.from_numpy(index.lengths[rows]),
        response_lengths=torch.from_numpy(index.response_lengths[rows]),
        win_rate=_float_rows(None if targets is None else targets.win_rate[rows], len(rows)),
        log_z=_float_rows(None if targets is None else targets.log_z[rows], len(rows)),
        preference=_float_rows(None if targets is None else targets.preference[rows], len(rows)),
        reference_log_prob=_float_rows(
            None if reference_GK is None else reference_GK[index.group[rows], index.response[rows]], len(rows)
        ),
    )


def _lay_out(
    documents: list[_Document],
    starts: list[tuple[int, int]],
    sizes: list[int],
    *,
    shape: tuple[int, int],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """Write documents into a [b, S] tensor -> tokens, position_ids, labels, response_rows and labels_R by name.

    Args:
        starts: batch row and column of each document's first token.
        sizes: tokens of each document, its own padding included.
    """
    tokens = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    position_ids = np.tile(np.arange(shape[1]), (shape[0], 1))
    response_rows, labels_R = [], []
    for document, (batch_row, begin), size in zip(documents, starts, sizes, strict=True):
        shared = document.parent >= 0
        before = len(documents[document.parent].tokens) if shared else 0
        position_ids[batch_row, begin : begin + size] = np.arange(before, before + size)
        end = begin + len(document.tokens)
        tokens[batch_row, begin:end] = document.tokens
        response = document.tokens[document.num_prompt_tokens :].astype(np.int64)
        predicting = np.arange(begin + document.num_prompt_tokens - 1, end - 1)
        labels[batch_row, predicting[shared:]] = response[shared:]
        if shared:
            predicting[0] = starts[document.parent][1] + before - 1  # the prompt's last position
        response_rows.append(predicting * shape[0] + batch_row)
        labels_R.append(response)
    return {
        "tokens": torch.from_numpy(tokens),
        "position_ids": torch.from_numpy(position_ids),
        "labels": torch.from_numpy(labels),
        "response_rows": torch.from_numpy(_joined(response_rows)),
        "labels_R": torch.from_numpy(_joined(labels_R)),
    }


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
