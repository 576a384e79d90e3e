"""The head's elementwise passes as two Triton kernels: forward reads a block of logits once, backward once, in place.

N = tokens, C = columns of a block, whose logits of one token adjoin. Only a GPU's branch imports this file.
Proven in Triton's interpreter (tests/triton), which knows nothing of speed.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096
"""Of one token that a program has in flight at a time: 16 logits a thread of 8 warps."""


class KernelPasses:
    """`TorchPasses` (log_ratio_passes.py) in float32, whatever the weight's dtype."""

    tokens_adjoin = False

    def __init__(self, softcap: float | None) -> None:
        self._cap: dict[str, Any] = {"cap": softcap or 1.0, "is_capped": softcap is not None}

    def accumulate(
        self, logits_CN: Tensor, labels_N: Tensor, first_column: int, maximum_N: Tensor, sums_2N: Tensor
    ) -> Tensor:
        """Take a block into the running softmax, in place -> [N], `maximum_N` itself."""
        num_columns, num_tokens = logits_CN.shape
        with torch.cuda.device_of(logits_CN):
            _accumulate[(num_tokens,)](
                logits_CN, labels_N, maximum_N, *sums_2N, logits_CN.stride(1), num_columns, first_column,
                **self._cap, **_shape(num_columns),
            )  # fmt: skip
        return maximum_N

    def differentiate_(
        self,
        logits_CN: Tensor,
        labels_N: Tensor,
        first_column: int,
        log_sum_exp_N: Tensor,
        grad_log_prob_N: Tensor,
        label_gradient_N: Tensor,
    ) -> None:
        """Replace logits by their gradient, in place."""
        num_columns, num_tokens = logits_CN.shape
        shape = _shape(num_columns)
        with torch.cuda.device_of(logits_CN):
            _differentiate[(num_tokens, triton.cdiv(num_columns, shape["size"]))](
                logits_CN, labels_N, log_sum_exp_N, grad_log_prob_N, label_gradient_N,
                logits_CN.stride(1), num_columns, first_column, **self._cap, **shape,
            )  # fmt: skip


def _shape(num_columns: int) -> dict[str, int]:
    size = min(_COLUMNS, triton.next_power_of_2(num_columns))
    return {"size": size, "num_warps": max(1, size // 512)}


@triton.jit
def _tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)  # the interpreter has no tanh; within 1.2e-7 everywhere, and +-1 at the ends


@triton.jit
def _local(label, first_column, num_columns):
    """The label's column in this block, or -1."""
    column = label - first_column
    return tl.where((column >= 0) & (column < num_columns), column, -1).to(tl.int32)


@triton.jit(do_not_specialize=["first_column"])
def _accumulate(
    logits, labels, maxima, sums, label_logits, stride, num_columns, first_column, cap,
    is_capped: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """One program a token: online maximum and sum of exponentials over its columns, and the label's logit."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    maximum = tl.load(maxima + token)
    total = tl.load(sums + token)
    for first in range(0, num_columns, size):
        column = first + tl.arange(0, size)
        inside = column < num_columns
        logit = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        if is_capped:
            logit = cap * _tanh(logit / cap)
        logit = tl.where(inside, logit, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logit, axis=0))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(logit - higher), axis=0)
        maximum = higher
    tl.store(maxima + token, maximum)
    tl.store(sums + token, total)
    label = _local(tl.load(labels + token), first_column, num_columns)
    if label >= 0:
        label_logit = tl.load(row + label).to(tl.float32)
        if is_capped:
            label_logit = cap * _tanh(label_logit / cap)
        tl.store(label_logits + token, label_logit)


@triton.jit(do_not_specialize=["first_column"])
def _differentiate(
    logits, labels, log_sum_exps, grads, label_gradients, stride, num_columns, first_column, cap,
    is_capped: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """One program a token and a stretch of its columns: logits become their gradient where they lie."""
    token = tl.program_id(0)
    column = tl.program_id(1) * size + tl.arange(0, size)
    inside = column < num_columns
    place = logits + token.to(tl.int64) * stride + column
    logit = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    scale = -tl.load(grads + token)
    if is_capped:
        bent = _tanh(logit / cap)
        logit = cap * bent
        scale = scale * (1 - bent * bent)
    gradient = scale * tl.exp(logit - tl.load(log_sum_exps + token))
    label = _local(tl.load(labels + token), first_column, num_columns)
    gradient = tl.where(column == label, tl.load(label_gradients + token), gradient)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)
