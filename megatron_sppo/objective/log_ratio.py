"""The head: hidden states and the output weight in, log-probabilities of the labels out, without [N, V] in memory.

N = tokens that predict a response token, H = hidden size, V = vocabulary (padded), V/tp = rows of this rank's shard,
B = sequences. Between forward and backward only hidden, weight, labels and one float32 per token are kept; backward
computes the logits again, block by block.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""float32 logits of one chunk. Larger on a GPU, where small products leave the tensor cores idle."""


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
) -> Tensor:
    """Log-probability of each label under softmax(hidden @ weight.T) -> [N], float32, nats, differentiable.

    The product is taken in the weight's dtype, all else (log-softmax, reductions, sums over blocks) in float32; float64
    weights stay in float64. A label outside the vocabulary gives NaN.

    Collectives on `tp_group`: forward one max and one sum all-reduce of [N] and [2, N]; backward one sum all-reduce of
    the gradient of `hidden`, in float32. None when N is 0, which every rank of the group sees alike.

    Args:
        hidden: [N, H], replicated over `tp_group`.
        weight: [V/tp, H]; rank r of `tp_group` holds rows r * V/tp and up.
        labels: [N], integers, ids in the whole vocabulary.
        tp_group: group that the vocabulary is sharded over; None for the whole weight.
        chunk_size: tokens whose logits exist at one time (backward: as many logits, cut the other way); None takes as
            many as fit in 64 MiB (512 MiB on a GPU).
        vocab_size: number of true columns; columns from there on are padding and never enter the softmax.
        logit_softcap: c, by which logits z become c tanh(z / c) before the softmax (Gemma-2); None leaves them.
    """
    assert hidden.ndim == 2 and weight.ndim == 2 and labels.shape == hidden.shape[:1], (
        f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    )
    if chunk_size is None:
        chunk_size = default_chunk_size(weight.shape[0], device_type=weight.device.type)
    assert chunk_size > 0
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    first_row = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    vocab_size = tp_size * weight.shape[0] if vocab_size is None else vocab_size
    assert 0 < vocab_size <= tp_size * weight.shape[0], f"vocab_size {vocab_size} > {tp_size * weight.shape[0]} rows"
    group = tp_group if tp_size > 1 else None
    log_prob: Tensor = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, group, chunk_size, vocab_size, first_row, logit_softcap
    )
    return log_prob


def default_chunk_size(num_rows: int, *, device_type: str) -> int:
    """Choose tokens per chunk whose float32 logits over `num_rows` columns fit the budget -> a power of two >= 16."""
    fitting = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cuda"]) // (4 * num_rows)
    return max(16, 1 << max(fitting, 1).bit_length() - 1)


def sequence_sums(log_prob: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Sum token log-probabilities per sequence, never averaging -> [B], float64; 0 for a sequence without rows.

    Hundreds of terms add up to hundreds of nats, where float32 steps by 6e-5 at every addition, in an order that
    depends on the layout (on a GPU on the run too). In float64 that is invisible; the caller rounds once, when the
    partial sums of all ranks are in.

    Args:
        log_prob: [N], float32.
        sequence_index: [N], int64, the sequence of each token, in [0, num_sequences).
    """
    assert log_prob.dtype in (torch.float32, torch.float64), f"{log_prob.dtype} loses whole nats in a sum"
    return log_prob.new_zeros(num_sequences, dtype=torch.float64).index_add(0, sequence_index, log_prob.double())


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        tp_group: dist.ProcessGroup | None,
        chunk_size: int,
        vocab_size: int,
        first_row: int,
        softcap: float | None,
    ) -> Tensor:
        num_tokens, num_columns = hidden.shape[0], min(max(vocab_size - first_row, 0), weight.shape[0])
        precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
        maximum = hidden.new_full((num_tokens,), -torch.inf, dtype=precise)
        # Row 0: sum of exp(logit - maximum); row 1: the label's logit, 0 on the ranks that do not hold its column.
        sums = hidden.new_zeros((2, num_tokens), dtype=precise)
        workspace = _workspace(weight, min(chunk_size, num_tokens) * num_columns, precise)
        for rows in _chunks(num_tokens if num_columns else 0, chunk_size):
            logits = _capped(_logits(hidden[rows], weight[:num_columns], workspace), softcap)
            column, is_local = _local_column(labels[rows], first_row, num_columns)
            sums[1, rows] = logits.gather(1, column.unsqueeze(1)).squeeze(1).masked_fill(~is_local, 0.0)
            torch.amax(logits, dim=1, out=maximum[rows])
            sums[0, rows] = logits.sub_(maximum[rows].unsqueeze(1)).exp_().sum(dim=1)
        if tp_group is not None and num_tokens:
            local_maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
            sums[0] *= torch.exp(local_maximum - maximum)
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=tp_group)
        log_sum_exp = maximum + sums[0].log()
        ctx.save_for_backward(hidden, weight, labels, log_sum_exp)
        ctx.tp_group, ctx.chunk_size, ctx.num_columns, ctx.first_row = tp_group, chunk_size, num_columns, first_row
        ctx.softcap = softcap
        # No rank holds such a column; NaN stops the run in its first step, with no synchronisation spent on the check.
        outside = (labels < 0) | (labels >= vocab_size)
        return (sums[1] - log_sum_exp).masked_fill(outside, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_log_prob,) = grad_outputs
        hidden, weight, labels, log_sum_exp = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        (num_tokens, num_columns), precise = (hidden.shape[0], ctx.num_columns), log_sum_exp.dtype
        grad_log_prob = grad_log_prob.to(precise)
        inputs = hidden.to(weight.dtype)
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=precise) if needs_hidden else None
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
        if grad_weight is not None:
            grad_weight[num_columns if num_tokens else 0 :].zero_()  # padding columns; the rest is written below
        # All tokens by a block of columns, as many logits as a chunk of tokens has in forward: each block of the
        # weight's gradient is then one product, summed in float32 by the hardware, rounded once: no [V/tp, H] float32.
        block = max(1, min(ctx.chunk_size * num_columns // max(num_tokens, 1), num_columns))
        workspace = _workspace(weight, block * num_tokens, precise)
        for columns in _chunks(num_columns if num_tokens else 0, block):
            logits = _capped(_logits(inputs, weight[columns], workspace), ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square()  # of c tanh(z / c)
            grad_logits = logits.sub_(log_sum_exp.unsqueeze(1)).exp_()
            grad_logits.mul_(-grad_log_prob.unsqueeze(1))
            column, is_local = _local_column(labels, ctx.first_row + columns.start, columns.stop - columns.start)
            grad_logits.scatter_add_(1, column.unsqueeze(1), grad_log_prob.masked_fill(~is_local, 0.0).unsqueeze(1))
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = _narrowed(grad_logits, workspace)
            if grad_hidden is not None:
                grad_hidden += grad_logits @ weight[columns]
            if grad_weight is not None:
                torch.mm(grad_logits.T, inputs, out=grad_weight[columns])
        if grad_hidden is not None and ctx.tp_group is not None and num_tokens:
            dist.all_reduce(grad_hidden, op=dist.ReduceOp.SUM, group=ctx.tp_group)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _chunks(num_tokens: int, chunk_size: int) -> list[slice]:
    return [slice(first, min(first + chunk_size, num_tokens)) for first in range(0, num_tokens, chunk_size)]


def _workspace(weight: Tensor, num_logits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Allocate what every block of logits overwrites -> [num_logits] in the weight's dtype, [num_logits] in `dtype`.

    Once, not once a block: on a CPU the first touch of fresh pages costs more than the arithmetic done on them.
    """
    narrow = weight.new_empty(num_logits)
    return narrow, narrow if weight.dtype == dtype else weight.new_empty(num_logits, dtype=dtype)


def _logits(hidden: Tensor, weight: Tensor, workspace: tuple[Tensor, Tensor]) -> Tensor:
    """Product in the weight's dtype, then widened -> [n, V/tp] in the workspace; the caller may overwrite it."""
    num_tokens, num_columns = hidden.shape[0], weight.shape[0]
    narrow, wide = (buffer[: num_tokens * num_columns].view(num_tokens, num_columns) for buffer in workspace)
    torch.mm(hidden.to(weight.dtype), weight.T, out=narrow)
    return narrow if narrow.dtype == wide.dtype else wide.copy_(narrow)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Cap logits softly, in place -> the same tensor."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _narrowed(logits: Tensor, workspace: tuple[Tensor, Tensor]) -> Tensor:
    """Round what `_logits` gave to the weight's dtype -> [n, V/tp], in the workspace."""
    narrow = workspace[0][: logits.numel()].view(logits.shape)
    return logits if logits.dtype == narrow.dtype else narrow.copy_(logits)


def _local_column(labels: Tensor, first_row: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Find the labels' columns in this rank's shard -> [n] int64 (0 where it has none), [n] bool (it has one)."""
    column = labels.long() - first_row
    is_local = (column >= 0) & (column < num_columns)
    return column.masked_fill(~is_local, 0), is_local
