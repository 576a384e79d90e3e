"""Which tokens each context-parallel rank holds: chunk r and chunk 2C - 1 - r of every document cut into 2C chunks.

Under a causal mask this gives all C ranks the same work. It is the split of Transformer Engine and of Megatron-Core's
rotary embedding (megatron-core 0.16.1, rope_utils.py), for padded rows and packed documents alike.
"""

import torch
from torch import Tensor


def zigzag_positions(boundaries: Tensor, *, rank: int, size: int) -> Tensor:
    """List the tokens of one context-parallel rank, document by document -> [T / size] int64, positions in the row.

    Args:
        boundaries: [documents + 1], where each document begins and, last, the row's length T. Each document's length
            is a multiple of 2 * size.
    """
    starts, ends = boundaries[:-1].tolist(), boundaries[1:].tolist()
    pieces = []
    for start, end in zip(starts, ends, strict=True):
        chunk, rest = divmod(end - start, 2 * size)
        assert rest == 0, f"a document of {end - start} tokens cannot be cut into {2 * size} chunks"
        for index in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.cat(pieces)
