"""FlexAttention by its own predicate: every pair of tokens is asked, no block is skipped.

B = sequences, H = heads, G = groups of keys and values, Q, K = queries, keys, D = head size.
"""

from typing import Any

import torch
from torch import Tensor

from tests.cudaless.engine.kernel import CALLS


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    **_: Any,
) -> Any:
    """Attend, [B, H, Q, D], [B, G, K, D] twice -> [B, H, Q, D], and its log-sum-exp [B, H, Q] if `return_lse`.

    Caller: the contract of torch/nn/attention/flex_attention.py flex_attention (torch 2.13). Sums are float32. A query
    that sees nothing attends to nothing: 0.

    Raises:
        ValueError: a mask of other lengths, or fewer groups than heads without `enable_gqa`.
    """
    CALLS["flex_attention"] += 1
    if query.shape[1] != key.shape[1]:
        if not enable_gqa:
            raise ValueError(f"{query.shape[1]} heads of queries and {key.shape[1]} of keys want enable_gqa=True")
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    sizes = (*query.shape[:3], key.shape[2])
    # batch, head, query and key as [B, 1, 1, 1], [H, 1, 1], [Q, 1] and [K]: predicates are elementwise
    places = [
        torch.arange(size, device=query.device, dtype=torch.int32).view(size, *[1] * (3 - dim))
        for dim, size in enumerate(sizes)
    ]
    scores = query.float() @ key.float().transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores, *places)
    if block_mask is not None:
        if tuple(block_mask.seq_lengths) != sizes[2:]:
            raise ValueError(f"block_mask was made for {tuple(block_mask.seq_lengths)} tokens, these are {sizes[2:]}")
        scores = scores.masked_fill(~block_mask.mask_mod(*places), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    context = (weights @ value.float()).to(query.dtype)
    return (context, lse) if return_lse else context
