"""Rotary embedding, fused: sbhd, and thd with the zigzag halves of context parallelism.

T = tokens of this rank, D = head size, R <= D the part that turns. Pairs are (i, i + R / 2).
"""

import torch
from torch import Tensor

from tests.cudaless.engine.constants import NVTE_QKV_Format
from tests.cudaless.engine.kernel import kernel, require_int32, spans


def _zigzag(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Count each token's place in its sequence -> [T]; a rank has chunks r and 2 * size - 1 - r of 2 * size."""
    places = []
    for first, last in spans(cu_seqlens // cp_size):
        length = last - first
        if cp_size == 1:
            places.append(torch.arange(length))
            continue
        if length % 2:
            raise RuntimeError(
                f"rope: {length} tokens of a sequence on a rank; context parallelism cuts them in halves"
            )
        chunk = length // 2
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            places.append(torch.arange(index * chunk, (index + 1) * chunk))
    return torch.cat(places)


def _turned(
    tensor: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    *,
    direction: int,
) -> Tensor:
    assert start_positions is None and not interleaved, "no path of this project asks for it"
    if freqs.dtype != torch.float32 or freqs.shape[1:3] != (1, 1):
        raise RuntimeError(f"rope: a table {tuple(freqs.shape)} of {freqs.dtype}, not [tokens, 1, 1, R] of float32")
    result = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)  # rows behind the last sequence are not written
    if qkv_format == NVTE_QKV_Format.NVTE_THD:
        assert cu_seqlens is not None and tensor.dim() == 3
        require_int32(cu_seqlens=cu_seqlens)
        places = _zigzag(cu_seqlens, cp_size, cp_rank)
    else:
        assert qkv_format == NVTE_QKV_Format.NVTE_SBHD and cp_size == 1 and tensor.dim() == 4
        places = torch.arange(tensor.shape[0])
    if len(places) and int(places.max()) >= len(freqs):
        raise RuntimeError(
            f"rope reads line {int(places.max())} of a table of {len(freqs)}: "
            "CUDA error: an illegal memory access was encountered"
        )
    if len(places) > len(tensor):
        raise RuntimeError(f"rope: sequences of {len(places)} tokens, and the tensor has {len(tensor)}")
    angle = freqs[places, 0] if tensor.dim() == 3 else freqs[places]
    turning, still = tensor[: len(places)].float().tensor_split([freqs.shape[-1]], dim=-1)
    first, second = turning.chunk(2, -1)
    turned = turning * angle.cos() + direction * torch.cat([-second, first], -1) * angle.sin()
    result[: len(places)] = torch.cat([turned, still], -1).to(tensor.dtype)
    return result


@kernel
def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Turn each pair of channels by its token's angle -> like `input`, contiguous.

    Caller: pytorch/attention/rope.py FusedRoPEFunc.forward (2.11.0).

    Args:
        freqs: [tokens, 1, 1, R] float32, angles.
        cu_seqlens: int32, of the whole sequences, not of this rank's parts.

    Raises:
        RuntimeError: a table that is shorter than the longest sequence: the kernel would read past its end.
    """
    rest = start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank
    return _turned(input, freqs, *rest, direction=1)


@kernel
def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Turn gradients back -> like `output_grads`, contiguous.

    Caller: pytorch/attention/rope.py FusedRoPEFunc.backward (2.11.0).
    """
    rest = start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank
    return _turned(output_grads, freqs, *rest, direction=-1)
