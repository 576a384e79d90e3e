"""The head: hidden states and the output weight in, log-probabilities of the labels out, without [N, V] in memory.

N = tokens that predict a response token, H = hidden size, V = vocabulary (padded), V/tp = rows of this rank's shard,
C = columns of one block of logits, B = sequences. All tokens go by C columns at a time, so that the weight is read
once, and each block of its gradient is one product. Between forward and backward hidden, weight, labels and one float32
per token are kept, and a ring of the last blocks' logits, whose bytes do not depend on N; backward starts from those
and computes the others again.
"""

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
"""Logits of one chunk, in the weight's dtype. Larger on a GPU, where small products leave the tensor cores idle."""

NUM_BUFFERS = 8
"""Blocks that a chunk's logits are divided into."""

_TILE_SIZE = {"cpu": 64 << 10, "cuda": 8 << 20}
"""Logits widened to float32 at a time: few enough to stay in the cache from one elementwise pass to the next."""

_LOG2_E = math.log2(math.e)


class WeightGradient(Protocol):
    """Where the weight's gradient is summed over micro-batches, in place of `weight.grad`."""

    @property
    def total(self) -> Tensor:
        """[V/tp, H], float32 or the weight's dtype; backward adds to it."""
        ...

    def added(self) -> Tensor | None:
        """Take note that backward has added to `total` -> what autograd is told is the weight's gradient."""
        ...


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    weight_gradient: WeightGradient | None = None,
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
        chunk_size: as many logits as these tokens have exist at one time; None: as many as fit in 128 MiB (256 MiB on
            a GPU).
        vocab_size: number of true columns; columns from there on are padding and never enter the softmax.
        logit_softcap: c, by which logits z become c tanh(z / c) before the softmax (Gemma-2); None leaves them.
        weight_gradient: takes the weight's gradient, summed in float32 (Megatron's `main_grad`); None gives it to
            autograd in the weight's dtype.
    """
    assert hidden.ndim == 2 and weight.ndim == 2 and labels.shape == hidden.shape[:1], (
        f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    )
    if chunk_size is None:
        chunk_size = default_chunk_size(weight.shape[0], weight.element_size(), device_type=weight.device.type)
    assert chunk_size > 0
    assert logit_softcap is None or logit_softcap > 0, f"logit_softcap {logit_softcap}"
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    first_row = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    vocab_size = tp_size * weight.shape[0] if vocab_size is None else vocab_size
    assert 0 < vocab_size <= tp_size * weight.shape[0], f"vocab_size {vocab_size} > {tp_size * weight.shape[0]} rows"
    group = tp_group if tp_size > 1 else None
    log_prob: Tensor = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, group, chunk_size, vocab_size, first_row, logit_softcap, weight_gradient
    )
    return log_prob


def default_chunk_size(num_rows: int, element_size: int, *, device_type: str) -> int:
    """Choose tokens per chunk whose logits over `num_rows` columns fit the budget -> a power of two >= 16."""
    fitting = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cuda"]) // (element_size * num_rows)
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
        logit_softcap: float | None,
        weight_gradient: WeightGradient | None,
    ) -> Tensor:
        num_tokens, num_columns = hidden.shape[0], min(max(vocab_size - first_row, 0), weight.shape[0])
        blocks = _LogitBlocks(weight[:num_columns], num_tokens, chunk_size)
        inputs = hidden.to(weight.dtype)
        maximum = hidden.new_full((num_tokens,), -torch.inf, dtype=blocks.precise)
        # Row 0: sum of exp(logit - maximum); row 1: the label's logit, 0 on the ranks that do not hold its column.
        sums = hidden.new_zeros((2, num_tokens), dtype=blocks.precise)
        for index, columns in enumerate(blocks.columns):
            logits_CN = blocks.logits(index, weight, inputs)
            column_1N, is_local = _local_column(labels, first_row + columns.start, columns.stop - columns.start)
            label_logit = _softcapped_(logits_CN.gather(0, column_1N).to(blocks.precise), logit_softcap)
            sums[1] += label_logit.masked_fill_(~is_local, 0.0)[0]
            for rows in blocks.tiles(columns):
                tile = _softcapped_(blocks.widened(logits_CN[rows]), logit_softcap)
                higher = torch.maximum(maximum, tile.amax(dim=0))
                sums[0] *= torch.exp(maximum - higher)
                sums[0] += _exp_(tile.sub_(higher)).sum(dim=0)
                maximum = higher
        if tp_group is not None and num_tokens:
            local_maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
            sums[0] *= torch.exp(local_maximum - maximum)
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=tp_group)
        log_sum_exp = maximum + sums[0].log()
        ctx.save_for_backward(hidden, weight, labels, log_sum_exp)
        ctx.blocks = blocks.keep()
        ctx.tp_group, ctx.chunk_size, ctx.num_columns, ctx.first_row = tp_group, chunk_size, num_columns, first_row
        ctx.logit_softcap, ctx.weight_gradient = logit_softcap, weight_gradient
        # No rank holds such a column; NaN stops the run in its first step, with no synchronisation spent on the check.
        outside = (labels < 0) | (labels >= vocab_size)
        return (sums[1] - log_sum_exp).masked_fill(outside, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum_exp = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # A second backward over the same graph finds no blocks and computes all of them again.
        blocks = ctx.blocks or _LogitBlocks(weight[: ctx.num_columns], hidden.shape[0], ctx.chunk_size)
        ctx.blocks = None
        grad_log_prob = grad_outputs[0].to(log_sum_exp.dtype)
        inputs = hidden.to(weight.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=log_sum_exp.dtype) if needs_hidden else None
        sink: WeightGradient | None = ctx.weight_gradient if needs_weight else None
        grad_weight = None
        if needs_weight and sink is None:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            grad_weight[ctx.num_columns if blocks.columns else 0 :].zero_()  # padding; the rest is written below
        # The CPU's products are quicker (5 %) with the hidden states laid along the dimension that is summed.
        inputs_HN = inputs.T.contiguous() if inputs.device.type == "cpu" else inputs.T
        for index, columns in reversed(list(enumerate(blocks.columns))):
            grad_logits_CN = blocks.logits(index, weight, inputs)
            local_column = _local_column(labels, ctx.first_row + columns.start, columns.stop - columns.start)
            blocks.differentiate_(grad_logits_CN, columns, *local_column, log_sum_exp, grad_log_prob, ctx.logit_softcap)
            if grad_hidden is not None:
                _add_product_(grad_hidden, grad_logits_CN.T, weight[columns])
            if sink is not None:
                _add_product_(sink.total[columns], grad_logits_CN, inputs_HN.T)
            elif grad_weight is not None:
                torch.mm(grad_logits_CN, inputs_HN.T, out=grad_weight[columns])
        del blocks  # before any placeholder of the weight's gradient is allocated
        if grad_hidden is not None and ctx.tp_group is not None and hidden.shape[0]:
            dist.all_reduce(grad_hidden, op=dist.ReduceOp.SUM, group=ctx.tp_group)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight if sink is None else sink.added(), *(None,) * 7


class _LogitBlocks:
    """Logits by blocks of columns, in a ring of buffers: what forward leaves in it, backward has for nothing."""

    def __init__(self, weight: Tensor, num_tokens: int, chunk_size: int) -> None:
        num_columns = weight.shape[0]
        self.precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
        fitting = max(1, min(chunk_size * num_columns // max(num_tokens, 1), num_columns))
        num_buffers = min(NUM_BUFFERS, fitting)
        size = fitting // num_buffers
        self.columns = _slices(num_columns if num_tokens else 0, size)
        self._first_held = len(self.columns)
        # Once, not once a block: on a CPU the first touch of fresh pages costs more than the arithmetic done on them.
        self._buffers = weight.new_empty(num_buffers, size * num_tokens)
        self._tile_rows = max(
            1, min(size, _TILE_SIZE.get(weight.device.type, _TILE_SIZE["cuda"]) // max(num_tokens, 1))
        )
        self._tile = weight.new_empty(self._tile_rows, num_tokens, dtype=self.precise)

    def keep(self) -> "_LogitBlocks":
        """Take note that the buffers hold the logits of the last blocks -> self."""
        self._first_held = len(self.columns) - len(self._buffers)
        return self

    def logits(self, index: int, weight: Tensor, inputs: Tensor) -> Tensor:
        """Compute block `index` in the weight's dtype, unless a buffer holds it -> [C, N], the buffer itself."""
        weight = weight[self.columns[index]]
        num_columns, num_tokens = weight.shape[0], inputs.shape[0]
        logits_CN = self._buffers[index % len(self._buffers), : num_columns * num_tokens].view(num_columns, num_tokens)
        return torch.mm(weight, inputs.T, out=logits_CN) if index < self._first_held else logits_CN

    def tiles(self, columns: slice) -> list[slice]:
        """Cut a block of columns into rows of its [C, N] that the cache holds while one pass follows another."""
        return _slices(columns.stop - columns.start, self._tile_rows)

    def widened(self, logits_CN: Tensor) -> Tensor:
        """Copy a tile of logits -> [C, N], float32, overwritten by the next call."""
        return self._tile[: logits_CN.shape[0]].copy_(logits_CN)

    def differentiate_(
        self,
        logits_CN: Tensor,
        columns: slice,
        column_1N: Tensor,
        is_local: Tensor,
        log_sum_exp: Tensor,
        grad_log_prob: Tensor,
        logit_softcap: float | None,
    ) -> None:
        """Replace a block's logits by their gradient: grad_log_prob * ([it is the label's] - probability)."""
        label_logit = _softcapped_(logits_CN.gather(0, column_1N).to(self.precise), logit_softcap)
        # 1 - p without its cancellation, for a label that is nearly certain.
        label_gradient = torch.expm1(label_logit - log_sum_exp).mul_(-grad_log_prob)
        if logit_softcap is not None:
            label_gradient *= _softcap_slope(label_logit, logit_softcap)
        negated = -grad_log_prob
        for rows in self.tiles(columns):
            tile = _softcapped_(self.widened(logits_CN[rows]), logit_softcap)
            slope = None if logit_softcap is None else _softcap_slope(tile, logit_softcap)
            _exp_(tile.sub_(log_sum_exp))
            torch.mul(tile if slope is None else tile.mul_(slope), negated, out=logits_CN[rows])
        others = logits_CN.gather(0, column_1N)
        logits_CN.scatter_(0, column_1N, torch.where(is_local, label_gradient.to(logits_CN.dtype), others))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _local_column(labels: Tensor, first_column: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Find the labels in a block of columns -> [1, N] int64 (0 where it has none), [1, N] bool (it has one)."""
    column = labels.long().unsqueeze(0) - first_column
    is_local = (column >= 0) & (column < num_columns)
    return column.masked_fill(~is_local, 0), is_local


def _exp_(values: Tensor) -> Tensor:
    """Exponentiate in place; by powers of two, which the CPU has in a third of the time."""
    return values.mul_(_LOG2_E).exp2_()


def _softcapped_(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _softcap_slope(capped: Tensor, cap: float) -> Tensor:
    """Derivative of cap * tanh(x / cap), from its value."""
    return 1 - (capped / cap).square_()


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, whose precision the device sums in where it can."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # torch >= 2.11 takes a float32 total with bfloat16 factors
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # no CPU kernel multiplies bfloat16 into float32: each product is rounded once, then added
        total.add_(left @ right)
