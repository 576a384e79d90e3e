"""Kernels over lists of tensors: the optimiser's step, norms, scaled copies; and the padding of experts' rows.

Values are float32 in between, whatever the tensors are.
"""

import torch
from torch import Tensor

from tests.cudaless.engine.kernel import kernel


@kernel
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Take a step of Adam in place.

    Caller: pytorch/optimizers/fused_adam.py FusedAdam.step (2.11.0).

    Args:
        noop_flag: not read, as in common/multi_tensor/adam.cu; the kernels for CUDA graphs do.
        tensor_lists: gradients, parameters, means, mean squares and, where parameters are 16 bits wide, masters.
        mode: 1 for AdamW's decay of the weight itself, 0 for L2 in the gradient.
        bias_correction: 1 to divide by 1 - beta^step.
    """
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, mean, square, *master in zip(*tensor_lists, strict=True):
        source = master[0] if master else parameter
        weight, grad = source.float(), gradient.float()
        if not mode:
            grad = grad + weight_decay * weight
        mean.copy_(beta1 * mean + (1 - beta1) * grad)
        square.copy_(beta2 * square + (1 - beta2) * grad * grad)
        update = (mean / first) / ((square / second).sqrt() + eps)
        if mode:
            update = update + weight_decay * weight
        for target in (parameter, *master):
            target.copy_(weight - lr * update)


@kernel
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Take the norm of all values -> ([1], of each tensor [tensors] if `per_tensor`) float32.

    Caller: pytorch/optimizers/multi_tensor_apply.py MultiTensorApply.__call__ (2.11.0), for
    megatron/core/optimizer/clip_grads.py get_grad_norm_fp32.
    """
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)


@kernel
def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """Write scaled copies, and 1 to the flag where a value is not finite.

    Caller: pytorch/optimizers/multi_tensor_apply.py MultiTensorApply.__call__ (2.11.0), for
    megatron/core/optimizer/clip_grads.py clip_grad_by_total_norm_fp32.
    """
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source.float() * scale)
        if not source.isfinite().all():
            noop_flag.fill_(1)


@kernel
def fused_multi_row_padding(input: Tensor, output: Tensor, rows: list[int], padded_rows: list[int]) -> None:
    """Copy each expert's rows, with rows of zeros behind them.

    Caller: pytorch/module/fp8_padding.py _Fp8Padding.forward (2.11.0).
    """
    output.zero_()
    for source, target in zip(input.split(rows), output.split(padded_rows), strict=True):
        target[: len(source)] = source


@kernel
def fused_multi_row_unpadding(input: Tensor, output: Tensor, padded_rows: list[int], rows: list[int]) -> None:
    """Copy each expert's rows without those behind them.

    Caller: pytorch/module/fp8_unpadding.py _Fp8Unpadding.forward (2.11.0).
    """
    for source, target in zip(input.split(padded_rows), output.split(rows), strict=True):
        target.copy_(source[: len(target)])
