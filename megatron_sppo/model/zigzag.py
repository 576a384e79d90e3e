"""Which tokens each context-parallel rank holds: chunk r and chunk 2C - 1 - r of every document cut into 2C chunks.

Under a causal mask this gives all C ranks the same work. It is the split of Transformer Engine and of Megatron-Core's
rotary embedding (megatron-core 0.16.1, rope_utils.py), for padded rows and packed documents alike. A row of shared
prompts is cut as if it were one document.
"""

import torch
from torch import Tensor


def zigzag_shares(boundaries: Tensor, *, num_tokens: int, size: int) -> Tensor:
    """List the tokens of every context-parallel rank -> [size, T / size] int64, positions in the row, ascending.

    On the device of `boundaries`, and without a wait for it.

    Args:
        boundaries: [documents + 1], where each document begins and, last, the row's length T. Each document's length
            is a multiple of 2 * size.
        num_tokens: T.
    """
    boundaries = boundaries.long()
    token = torch.arange(num_tokens, device=boundaries.device)
    document = torch.bucketize(token, boundaries[1:], right=True)
    chunk = (token - boundaries[document]) * (2 * size) // boundaries.diff()[document]
    holder = torch.minimum(chunk, 2 * size - 1 - chunk)
    return holder.argsort(stable=True).view(size, -1)


def zigzag_positions(boundaries: Tensor, *, rank: int, size: int) -> Tensor:
    """List the tokens of one context-parallel rank, document by document -> [T / size] int64, positions in the row.

    Args:
        boundaries: as above.
    """
    unfit = boundaries.diff() % (2 * size) != 0
    assert not unfit.any(), f"documents of {boundaries.diff()[unfit].tolist()} tokens cannot be cut into {2 * size}"
    return zigzag_shares(boundaries, num_tokens=int(boundaries[-1]), size=size)[rank]
