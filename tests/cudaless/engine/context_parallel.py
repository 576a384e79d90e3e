"""Helpers of Transformer Engine's ring of context parallelism, for packed sequences (thd).

T = tokens of this rank, H = heads, D = head size. A rank has two chunks of each sequence, the earlier first: the halves
of what `cu_seqlens`, here those of this rank's parts, bounds. Log-sum-exp is packed, [H, T].
"""

import torch
from torch import Tensor

from tests.cudaless.engine.kernel import concatenated, kernel, require_int32, spans


def _half(cu_seqlens: Tensor, half: int) -> Tensor:
    """List the rows of each sequence's first or second half -> [T / 2]."""
    require_int32(cu_seqlens=cu_seqlens)
    halves = [((a, (a + b) // 2), ((a + b) // 2, b)) for a, b in spans(cu_seqlens)]
    return concatenated([each[half] for each in halves])


@kernel
def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    """Take half of each sequence, [T, H, D] -> [T / 2, H, D].

    Caller: pytorch/attention/dot_product_attention/context_parallel.py cp_p2p_fwd_prepare_qkv (2.11.0).
    """
    return tensor[_half(cu_seqlens, half_idx)]


@kernel
def thd_second_half_lse_correction(lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    """Add a step's exponentials, of second halves only, to the log-sum-exp in place.

    Caller: pytorch/attention/dot_product_attention/context_parallel.py AttnFuncWithCPAndKVP2P.forward (2.11.0).
    """
    assert lse_packed
    rows = _half(cu_seqlens, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], lse_per_step[:, : len(rows)])


@kernel
def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int) -> Tensor:
    """Take the second halves' log-sum-exp, [H, T] -> [H, `second_half_lse_seqlen`].

    Caller: pytorch/attention/dot_product_attention/context_parallel.py AttnFuncWithCPAndKVP2P.backward (2.11.0).
    """
    assert lse_packed
    rows = _half(cu_seqlens, 1)
    result = torch.zeros(len(lse), second_half_lse_seqlen)
    result[:, : len(rows)] = lse[:, rows]
    return result


@kernel
def thd_out_correction(
    out: Tensor,
    out_per_step: Tensor,
    lse: Tensor,
    lse_per_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    lse_packed: bool,
) -> None:
    """Add a step's output by its share of the softmax, exp(lse_per_step - lse), in place.

    Caller: pytorch/attention/dot_product_attention/context_parallel.py AttnFuncWithCPAndKVP2P.forward (2.11.0).
    """
    assert lse_packed
    require_int32(cu_seqlens=cu_seqlens)
    rows = _half(cu_seqlens, 1) if only_second_half else torch.arange(int(cu_seqlens[-1]))
    share = torch.exp(lse_per_step[:, : len(rows)] - lse[:, rows]).T.unsqueeze(-1)
    out[rows] = (out[rows].float() + out_per_step[: len(rows)].float() * share).to(out.dtype)


@kernel
def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Take a step's gradient into the sum in place: a half is left ("none"), set ("copy") or added to ("add").

    Caller: pytorch/attention/dot_product_attention/context_parallel.py AttnFuncWithCPAndKVP2P.backward (2.11.0).

    Args:
        grad_per_step: rows of both halves, or of the one that is not left.
    """
    assert {first_half, second_half} <= {"none", "copy", "add"}
    for half, action in enumerate((first_half, second_half)):
        if action != "none":
            rows = _half(cu_seqlens, half)
            step = grad_per_step[rows] if "none" not in (first_half, second_half) else grad_per_step[: len(rows)]
            grad[rows] = step if action == "copy" else grad[rows] + step
