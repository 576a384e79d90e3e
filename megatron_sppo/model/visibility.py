"""Which token sees which: one predicate, read as an explicit mask on the CPU and as FlexAttention's on CUDA.

A row of tokens is cut into documents. A token sees its own document and the one that this continues (a response its
prompt), of both what does not come later in its sequence and lies within the layer's window. T = tokens of the row,
C = context-parallel ranks: each holds T / C of the tokens as queries and sees the keys of all.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from megatron_sppo.model.zigzag import zigzag_shares

_BLOCK = 128
"""Tokens that FlexAttention's kernels take, or skip, at once: its default."""
_PAIRS_AT_ONCE = 2**24
"""Pairs of tokens that a mask is evaluated for at a time: 64 MiB an int32 tensor, whatever T is."""
_UNLIMITED = 2**31 - 1


class Tokens(NamedTuple):
    """What the predicate asks of tokens; int32, of any one shape."""

    document: Tensor
    """Number of the token's document."""
    parent: Tensor
    """Number of the document that this one continues; -1: none."""
    position: Tensor
    """The token's place in its sequence, from 0."""

    def at(self, index: Tensor | slice) -> "Tokens":
        """Take some tokens -> Tokens."""
        return Tokens(self.document[index], self.parent[index], self.position[index])

    def column(self) -> "Tokens":
        """Stand them upright, to be compared with tokens in a row -> Tokens of [T, 1]."""
        return Tokens(self.document[:, None], self.parent[:, None], self.position[:, None])


def sees(query: Tokens, key: Tokens, window: int | Tensor | None) -> Tensor:
    """Say which queries see which keys -> bool, of the shapes broadcast.

    Args:
        window: how many tokens of its sequence a query sees, its own included; None: all.
    """
    distance = query.position - key.position
    related = (key.document == query.document) | (key.document == query.parent)
    earlier = related & (distance >= 0)
    return earlier if window is None else earlier & (distance < window)


def tokens_of_row(documents: Tensor, parents: Tensor | None, *, num_tokens: int) -> Tokens:
    """Describe every token of a row -> Tokens of [T]. Waits for no device.

    Args:
        documents: [documents + 1], where each begins and, last, T.
        parents: [documents]; None: no document continues another.
    """
    documents = documents.int()
    token = torch.arange(num_tokens, dtype=torch.int32, device=documents.device)
    document = torch.bucketize(token, documents[1:], right=True, out_int32=True)
    position = token - documents[document]
    if parents is None:
        return Tokens(document, torch.full_like(token, -1), position)
    parent = parents.int()[document]
    return Tokens(document, parent, position + torch.where(parent >= 0, documents.diff()[parent], 0))


class Row:
    """One row of tokens as a context-parallel rank attends to it; masks of it are made once for all layers."""

    def __init__(
        self, documents: Tensor, parents: Tensor | None = None, *, num_tokens: int, rank: int = 0, size: int = 1
    ) -> None:
        """Describe a row; nothing is computed before a layer asks.

        Args:
            documents: [documents + 1] int, where each begins and, last, T.
            parents: [documents] int, the document that each one continues, or -1; None where prompts are not shared.
            num_tokens: T, of all `size` ranks.
        """
        self.documents, self.parents = documents, parents
        self._num_tokens, self._rank, self._size = num_tokens, rank, size
        self._block_masks: dict[int | None, BlockMask] = {}

    @property
    def shares(self) -> Tensor:
        """Boundaries of what is cut into 2 C chunks: the documents, or the whole row where prompts are shared."""
        return self.documents if self.parents is None else self.documents[:: len(self.documents) - 1].contiguous()

    @cached_property
    def keys(self) -> Tokens:
        """All tokens of the row, in its order."""
        return tokens_of_row(self.documents, self.parents, num_tokens=self._num_tokens)

    @cached_property
    def queries(self) -> Tokens:
        """This rank's tokens."""
        return self.keys if self._size == 1 else self.keys.at(self._held[self._rank])

    @cached_property
    def order(self) -> Tensor:
        """Where each token of the row lies among those gathered rank by rank -> [T] int64."""
        return self._held.flatten().argsort()

    def held(self, rank: int) -> Tensor:
        """Where in the row a context-parallel rank's tokens lie, in its order -> [T / C] int64."""
        return self._held[rank]

    @cached_property
    def _held(self) -> Tensor:
        return zigzag_shares(self.shares, num_tokens=self._num_tokens, size=self._size)

    @cached_property
    def ranges(self) -> list[tuple[slice, int]]:
        """List each document's tokens, and the number of the one that it continues or -1. Waits for the device."""
        bounds = self.documents.tolist()
        parents = [-1] * (len(bounds) - 1) if self.parents is None else self.parents.tolist()
        return [(slice(*pair), parent) for pair, parent in zip(itertools.pairwise(bounds), parents, strict=True)]

    @cached_property
    def spans(self) -> list[tuple[slice, Tensor | slice, bool]]:
        """List, document by document, this rank's queries, the keys of its path, and whether it is all of that path.

        Waits for the device.
        """
        bounds = self.documents.tolist()
        lengths = torch.bincount(self.queries.document, minlength=len(bounds) - 1).tolist()
        found: list[tuple[slice, Tensor | slice, bool]] = []
        first = 0
        for number, (own, parent) in enumerate(self.ranges):
            here = slice(first, first + lengths[number])
            first = here.stop
            if lengths[number] and parent < 0:
                found.append((here, own, lengths[number] == own.stop - own.start))
            elif lengths[number]:
                path = [torch.arange(bounds[parent], bounds[parent + 1]), torch.arange(own.start, own.stop)]
                found.append((here, torch.cat(path).to(self.documents.device), False))
        return found

    def block_mask(self, window: int | None) -> BlockMask:
        """Make FlexAttention's mask -> BlockMask of [T / C, T]. Holds no [T / C, T] and waits for no device."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self.queries, self.keys, window)
        return self._block_masks[window]


@dataclass(kw_only=True)
class PackedRow(PackedSeqParams):
    """Megatron-Core's description of a packed row, with ours.

    To Megatron-Core a row of shared prompts is ONE sequence (`cu_seqlens_q` = [0, T]) whose rotary table has a line for
    each token, as `gpt.PolicyModel` makes it: all that it does with the boundaries, apart from handing them on to core
    attention, is to apply that table to this rank's zigzag share of the sequence.
    """

    row: Row

    @property
    def shares_prompts(self) -> bool:
        """Whether documents continue others."""
        return self.row.parents is not None


@lru_cache(maxsize=8)
def undivided_row(num_tokens: int, *, rank: int, size: int, device: torch.device) -> Row:
    """Describe a row that is one document (micro-batches that are padded, not packed) -> Row; the last few are kept."""
    return Row(torch.tensor([0, num_tokens], device=device), num_tokens=num_tokens, rank=rank, size=size)


def _block_mask(queries: Tokens, keys: Tokens, window: int | None) -> BlockMask:
    """Sort the blocks of [queries, keys] into those to skip, to take whole and to take by the predicate -> BlockMask.

    What torch's create_block_mask does, over a few blocks of queries at a time: that one holds all pairs at once.
    """
    num_queries, num_keys = len(queries.document), len(keys.document)
    # A tensor, so that one kernel is compiled for all windows.
    limit = queries.document.new_full((), _UNLIMITED if window is None else window)
    # Padding sees and is seen by nobody: it belongs to documents that there are not.
    rows = Tokens(*(pad(of, (0, -num_queries % _BLOCK), value=-2) for of in queries))
    columns = Tokens(*(pad(of, (0, -num_keys % _BLOCK), value=-3) for of in keys))
    num_columns = len(columns.document)
    at_once = max(1, _PAIRS_AT_ONCE // (num_columns * _BLOCK)) * _BLOCK
    counts = []
    for first in range(0, len(rows.document), at_once):
        seen = sees(rows.at(slice(first, first + at_once)).column(), columns, limit)
        counts.append(seen.view(-1, _BLOCK, num_columns // _BLOCK, _BLOCK).sum((1, 3)))
    seen_in_block = torch.cat(counts)[None, None]
    whole = seen_in_block == _BLOCK**2
    partial = (seen_in_block > 0) & ~whole

    def mask_mod(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(queries.at(q), keys.at(k), limit)

    # By blocks of queries for the forward pass, by blocks of keys for the backward pass.
    by_queries, by_keys = (partial, whole), (partial.mT, whole.mT)
    lists = [part for blocks in (*by_queries, *by_keys) for part in _listed(blocks)]
    build: Any = BlockMask
    return build((num_queries, num_keys), *lists, BLOCK_SIZE=(_BLOCK, _BLOCK), mask_mod=mask_mod)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """List in each row of blocks those that are True, first -> (how many, their numbers), int32.

    Contiguous, as the kernels take for granted: they know the strides of rows, not of a row's elements.
    """
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).contiguous(), order.int().contiguous()
