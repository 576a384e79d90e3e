"""What the head does to a block of logits between its products, in plain torch: any device, any dtype.

N = tokens, C = columns of a block. log_ratio_kernels.py has the same passes fused, for a GPU.
"""

import math

import torch
from torch import Tensor

_TILE_SIZE = {"cpu": 64 << 10, "cuda": 8 << 20}
"""Logits widened to float32 at a time: few enough to stay in the cache from one elementwise pass to the next."""

_LOG2_E = math.log2(math.e)


class TorchPasses:
    """Elementwise passes over blocks of logits [C, N] whose columns begin at `first_column` of the vocabulary.

    By torch's own operators over tiles of rows.
    """

    tokens_adjoin = True
    """Neighbours in memory are the logits of neighbouring tokens ([C, N] as it is written), or else of columns."""

    def __init__(self, weight: Tensor, *, num_tokens: int, block_size: int, softcap: float | None) -> None:
        fitting = _TILE_SIZE.get(weight.device.type, _TILE_SIZE["cuda"]) // max(num_tokens, 1)
        self._rows = max(1, min(block_size, fitting))
        precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._tile = weight.new_empty(self._rows, num_tokens, dtype=precise)
        self._softcap = softcap

    def accumulate(
        self, logits_CN: Tensor, labels_N: Tensor, first_column: int, maximum_N: Tensor, sums_2N: Tensor
    ) -> Tensor:
        """Take a block into the running softmax -> [N], the new maximum, which `maximum_N` may have become.

        Args:
            sums_2N: row 0: sum of exp(logit - maximum); row 1: the label's logit, once its column has come.
        """
        column_1N, is_local = _local_column(labels_N, first_column, logits_CN.shape[0])
        label_logit = softcapped_(logits_CN.gather(0, column_1N).to(self._tile.dtype), self._softcap)
        sums_2N[1] += label_logit.masked_fill_(~is_local, 0.0)[0]
        for rows in slices(0, logits_CN.shape[0], self._rows):
            tile = softcapped_(self._widened(logits_CN[rows]), self._softcap)
            higher = torch.maximum(maximum_N, tile.amax(dim=0))
            sums_2N[0] *= torch.exp(maximum_N - higher)
            sums_2N[0] += _exp_(tile.sub_(higher)).sum(dim=0)
            maximum_N = higher
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
        """Replace logits by their gradient: `label_gradient_N` in the label's column, -grad * probability elsewhere."""
        negated = -grad_log_prob_N
        for rows in slices(0, logits_CN.shape[0], self._rows):
            tile = softcapped_(self._widened(logits_CN[rows]), self._softcap)
            slope = None if self._softcap is None else softcap_slope(tile, self._softcap)
            _exp_(tile.sub_(log_sum_exp_N))
            torch.mul(tile if slope is None else tile.mul_(slope), negated, out=logits_CN[rows])
        column_1N, is_local = _local_column(labels_N, first_column, logits_CN.shape[0])
        others = logits_CN.gather(0, column_1N)
        logits_CN.scatter_(0, column_1N, torch.where(is_local, label_gradient_N.to(logits_CN.dtype), others))

    def _widened(self, logits_CN: Tensor) -> Tensor:
        """Copy a tile of logits -> [C, N], float32, overwritten by the next call."""
        return self._tile[: logits_CN.shape[0]].copy_(logits_CN)


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Cut start..stop into pieces of `size`, the last as long as it comes out -> slices."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def softcapped_(logits: Tensor, cap: float | None) -> Tensor:
    """Bend logits in place to cap * tanh(logit / cap); None leaves them."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def softcap_slope(capped: Tensor, cap: float) -> Tensor:
    """Derivative of cap * tanh(x / cap), from its value."""
    return 1 - (capped / cap).square_()


def _local_column(labels_N: Tensor, first_column: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Find the labels in a block of columns -> [1, N] int64 (0 where it has none), [1, N] bool (it has one)."""
    column = labels_N.unsqueeze(0) - first_column
    is_local = (column >= 0) & (column < num_columns)
    return column.masked_fill(~is_local, 0), is_local


def _exp_(values: Tensor) -> Tensor:
    """Exponentiate in place; by powers of two, which the CPU has in a third of the time."""
    return values.mul_(_LOG2_E).exp2_()
