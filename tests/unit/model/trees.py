"""Rows of documents that continue each other, and attention over each of their paths on its own, written out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sppo.model.visibility import PackedRow, Row


@dataclass(frozen=True)
class Tree:
    """A row by its documents: how many tokens each has, and which one it continues (-1: none)."""

    lengths: list[int]
    parents: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def tokens_of(self, document: int) -> list[int]:
        start = sum(self.lengths[:document])
        return list(range(start, start + self.lengths[document]))

    def paths(self) -> list[tuple[list[int], int]]:
        """List for each document the tokens of its sequence, and how many of them come before it."""
        before = [self.tokens_of(parent) if parent >= 0 else [] for parent in self.parents]
        return [(head + self.tokens_of(number), len(head)) for number, head in enumerate(before)]

    def row(self, *, rank: int = 0, size: int = 1) -> Row:
        bounds = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        parents = torch.tensor(self.parents, dtype=torch.int32) if any(p >= 0 for p in self.parents) else None
        return Row(bounds, parents, num_tokens=self.num_tokens, rank=rank, size=size)

    def packed(self) -> PackedRow:
        row = self.row()
        return PackedRow(qkv_format="thd", cu_seqlens_q=row.shares, cu_seqlens_kv=row.shares, row=row)

    def visible(self, window: int | None) -> Tensor:
        """Say token by token who sees whom -> [T, T] bool: what is on the path, not later and within the window."""
        seen = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool)
        for path, before in self.paths():
            for place, q in list(enumerate(path))[before:]:
                for k in path[0 if window is None else max(0, place - window + 1) : place + 1]:
                    seen[q, k] = True
        return seen

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[T, heads, D], [T, groups, D] twice -> [T, heads * D]: each path by itself; sinks [heads]."""
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        context = torch.full_like(query, torch.nan)
        for path, before in self.paths():
            scores = torch.einsum("shd,thd->hst", query[path[before:]], key[path]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            place = torch.arange(len(path))
            hidden = place > place[before:, None]
            if window is not None:
                hidden |= place <= place[before:, None] - window
            weights = scores.masked_fill(hidden, -torch.inf).exp()
            others = 0.0 if sinks is None else sinks.exp()[:, None, None]
            weights = weights / (weights.sum(-1, keepdim=True) + others)
            context[path[before:]] = torch.einsum("hst,thd->shd", weights, value[path])
        return context.flatten(1)


# A prompt of 4 with responses of 3, 1 and 5; a prompt of 2 with one of 4; padding of 5.
SMALL = Tree([4, 3, 1, 5, 2, 4, 5], [-1, 0, 0, 0, -1, 4, -1])
# None of these continues another.
SEQUENCES = Tree([8, 16, 24, 8], [-1, -1, -1, -1])


def random_tree(seed: int, *, num_tokens: int) -> Tree:
    """Grow prompts with up to 4 responses each, and end in padding; lengths from 1 to 90."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    lengths: list[int] = []
    parents: list[int] = []
    while sum(lengths) < num_tokens - 500:
        prompt, responses = len(lengths), number(4)
        lengths += [number(90) for _ in range(1 + responses)]
        parents += [-1] + [prompt] * responses
    return Tree([*lengths, num_tokens - sum(lengths)], [*parents, -1])


def random_heads(num_tokens: int, *, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Draw queries, keys and values -> [T, heads, 16], [T, groups, 16] twice."""
    torch.manual_seed(0)
    return [torch.randn(num_tokens, count, 16, dtype=dtype, requires_grad=True) for count in (heads, groups, groups)]
