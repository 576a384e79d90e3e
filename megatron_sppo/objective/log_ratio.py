"""The head: hidden states and the output weight in, log-probabilities of the labels out, without [N, V] in memory.

N = tokens that predict a response token, H = hidden size, V = vocabulary (padded), V/tp = rows of this rank's shard,
C = columns of one block of logits, B = sequences. All tokens go by C columns at a time, so that the weight is read
once, and each block of its gradient is one product. Between forward and backward hidden, weight, labels and two float32
per token are kept, and a ring of the last blocks' logits, whose bytes do not depend on N; backward starts from those
and computes the others again. Between the products lie elementwise passes: torch's (log_ratio_passes.py), or on a GPU
two kernels (log_ratio_kernels.py) that move each bfloat16 logit three times, 2 bytes in forward and 4 in backward.

The budget of a GPU, by the roofline of an H100 (989 TFLOP/s, 3.35 TB/s), at H = 4096, V = 128256 and bfloat16:

- One product is 2 N H V operations, 8.70 ms at N = 8192, and none can do with fewer than three. Ours are 4 - f, where
  the ring keeps the share f of the logits. The kernels' 6 N V bytes take 1.88 ms, 0.072 of the three products.
- Over the two gradients that come out, backward holds the ring and the float32 sum of the hidden states' gradient
  instead of its bfloat16: a ring of 704 MiB and 256 MiB at N = 32768, of 1 GiB allowed.
- The ring keeps f = 0.351 at N = 8192 and 0.088 at N = 32768: (4 - f) / 3 + 0.072 is 1.288 and 1.376 times the three
  products. That is training's figure, where the weight's gradient is summed in Megatron's buffer.
- Where autograd gets the weight's gradient, its memory is made in forward and keeps further logits until it is due: f
  is 0.527 and 0.176, and the ratio 1.230 and 1.347.
"""

import ctypes
import logging
import os
import shutil
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sppo.objective.chunk_size import NUM_BUFFERS, default_chunk_size
from megatron_sppo.objective.log_ratio_passes import TorchPasses, slices, softcap_slope

if TYPE_CHECKING:
    from megatron_sppo.objective.log_ratio_kernels import KernelPasses

    Passes = TorchPasses | KernelPasses

logger = logging.getLogger(__name__)

_DRIVER = "libcuda.so.1"
"""Every process that uses a real GPU has it loaded."""

_ALIGNMENT = 128
"""Columns of a block on a GPU are a multiple of it: whole tiles of the tensor cores, rows that begin at 256 bytes."""


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
    rows_of_ranks: Sequence[int] | None = None,
) -> Tensor:
    """Log-probability of each label under softmax(hidden @ weight.T) -> [N], float32, nats, differentiable.

    The product is taken in the weight's dtype, all else (log-softmax, reductions, sums over blocks) in float32; float64
    weights stay in float64. A label outside the vocabulary gives NaN.

    Collectives on `tp_group`: forward one max and one sum all-reduce of [N] and [2, N]; backward one sum all-reduce of
    the gradient of `hidden`, in float32. With `rows_of_ranks` forward begins with a broadcast of each rank's rows, and
    backward ends with a sum of each rank's gradient on that rank alone. None when N is 0, which every rank sees alike.

    Args:
        hidden: [N, H], replicated over `tp_group`; with `rows_of_ranks` this rank's rows alone.
        weight: [V/tp, H]; rank r of `tp_group` holds rows r * V/tp and up.
        labels: [N], integers, ids in the whole vocabulary.
        tp_group: group that the vocabulary is sharded over; None for the whole weight.
        chunk_size: as many logits as these tokens have exist at one time (on a GPU whole blocks of 128 columns); None:
            as many as fit in 128 MiB (704 MiB on a GPU). More lie on a GPU in what becomes the weight's gradient.
        vocab_size: number of true columns; columns from there on are padding and never enter the softmax.
        logit_softcap: c, by which logits z become c tanh(z / c) before the softmax (Gemma-2); None leaves them.
        weight_gradient: takes the weight's gradient, summed in float32 (Megatron's `main_grad`); None gives it to
            autograd in the weight's dtype.
        rows_of_ranks: rows that each rank of `tp_group` brings (sequence parallelism), N together; labels, and the
            answer, are in the order of ranks.
    """
    if chunk_size is None:
        chunk_size = default_chunk_size(weight.shape[0], weight.element_size(), device_type=weight.device.type)
    assert chunk_size > 0
    assert logit_softcap is None or logit_softcap > 0, f"logit_softcap {logit_softcap}"
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    first_row = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    vocab_size = tp_size * weight.shape[0] if vocab_size is None else vocab_size
    assert 0 < vocab_size <= tp_size * weight.shape[0], f"vocab_size {vocab_size} > {tp_size * weight.shape[0]} rows"
    group = tp_group if tp_size > 1 else None
    rows = None if rows_of_ranks is None or group is None else tuple(rows_of_ranks)
    num_rows = labels.shape[0] if rows is None else rows[dist.get_rank(group)]
    assert labels.ndim == 1 and hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[0] == num_rows, (
        f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}, rows {rows}"
    )
    assert rows is None or sum(rows) == labels.shape[0], f"{labels.shape[0]} labels, rows of ranks {rows}"
    has_spare = _keeps_logits_in_gradient(weight, weight_gradient)
    log_prob: Tensor = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        labels,
        group,
        rows,
        chunk_size,
        vocab_size,
        first_row,
        logit_softcap,
        weight_gradient,
        has_spare,
    )
    return log_prob


def _keeps_logits_in_gradient(weight: Tensor, weight_gradient: WeightGradient | None) -> bool:
    """Say whether autograd's gradient of the weight is made in forward, so that its memory keeps logits until then."""
    return torch.is_grad_enabled() and weight.requires_grad and weight_gradient is None and weight.device.type != "cpu"


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
        rows_of_ranks: tuple[int, ...] | None,
        chunk_size: int,
        vocab_size: int,
        first_row: int,
        logit_softcap: float | None,
        weight_gradient: WeightGradient | None,
        has_spare: bool,
    ) -> Tensor:
        num_tokens, num_columns = labels.shape[0], min(max(vocab_size - first_row, 0), weight.shape[0])
        labels = labels.long().contiguous()
        inputs = hidden.to(weight.dtype)
        if rows_of_ranks is not None and tp_group is not None:
            inputs = _all_rows(inputs, rows_of_ranks, tp_group)
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if has_spare else None
        blocks = _LogitBlocks(weight[:num_columns], num_tokens, chunk_size, logit_softcap, spare=grad_weight)
        maximum = hidden.new_full((num_tokens,), -torch.inf, dtype=blocks.precise)
        # Row 0: sum of exp(logit - maximum); row 1: the label's logit, 0 on the ranks that do not hold its column.
        sums = hidden.new_zeros((2, num_tokens), dtype=blocks.precise)
        for index, columns in enumerate(blocks.columns):
            logits_CN = blocks.logits(index, weight, inputs)
            maximum = blocks.passes.accumulate(logits_CN, labels, first_row + columns.start, maximum, sums)
        if tp_group is not None and num_tokens:
            local_maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
            sums[0] *= torch.exp(local_maximum - maximum)
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=tp_group)
        log_sum_exp, label_logit = sums[0].log_().add_(maximum), sums[1]
        ctx.save_for_backward(inputs, weight, labels, sums)
        ctx.blocks, ctx.grad_weight = blocks.keep(), grad_weight
        ctx.hidden_dtype, ctx.rows_of_ranks = hidden.dtype, rows_of_ranks
        ctx.tp_group, ctx.chunk_size, ctx.num_columns, ctx.first_row = tp_group, chunk_size, num_columns, first_row
        ctx.logit_softcap, ctx.weight_gradient = logit_softcap, weight_gradient
        # No rank holds such a column; NaN stops the run in its first step, with no synchronisation spent on the check.
        outside = (labels < 0) | (labels >= vocab_size)
        return (label_logit - log_sum_exp).masked_fill(outside, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, labels, (log_sum_exp, label_logit) = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # A second backward over the same graph finds no blocks and computes all of them again.
        blocks = ctx.blocks or _LogitBlocks(
            weight[: ctx.num_columns], inputs.shape[0], ctx.chunk_size, ctx.logit_softcap
        )
        grad_weight = ctx.grad_weight
        ctx.blocks = ctx.grad_weight = None
        grad_log_prob = grad_outputs[0].to(log_sum_exp.dtype).contiguous()
        # 1 - p without its cancellation, for a label that is nearly certain.
        label_gradient = torch.expm1(label_logit - log_sum_exp).mul_(-grad_log_prob)
        if ctx.logit_softcap is not None:
            label_gradient *= softcap_slope(label_logit, ctx.logit_softcap)
        grad_hidden = torch.zeros_like(inputs, dtype=log_sum_exp.dtype) if needs_hidden else None
        sink: WeightGradient | None = ctx.weight_gradient if needs_weight else None
        if needs_weight and sink is None:
            if grad_weight is None:
                grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            grad_weight[ctx.num_columns if blocks.columns else 0 :].zero_()  # padding; the rest is written below
        # The CPU's products are quicker (5 %) with the hidden states laid along the dimension that is summed.
        inputs_HN = inputs.T.contiguous() if inputs.device.type == "cpu" else inputs.T
        for index, columns in reversed(list(enumerate(blocks.columns))):
            grad_logits_CN = blocks.logits(index, weight, inputs)
            blocks.passes.differentiate_(
                grad_logits_CN, labels, ctx.first_row + columns.start, log_sum_exp, grad_log_prob, label_gradient
            )
            if grad_hidden is not None:
                _add_product_(grad_hidden, grad_logits_CN.T, weight[columns])
            if sink is not None:
                _add_product_(sink.total[columns], grad_logits_CN, inputs_HN.T)
            elif grad_weight is not None:
                torch.mm(grad_logits_CN, inputs_HN.T, out=grad_weight[columns])
            del grad_logits_CN  # a view of the ring
        del blocks  # before the gradient is rounded, and any placeholder of the weight's is allocated
        if grad_hidden is not None and ctx.rows_of_ranks is not None:
            grad_hidden = _own_sum(grad_hidden, ctx.rows_of_ranks, ctx.tp_group)
        elif grad_hidden is not None and ctx.tp_group is not None and inputs.shape[0]:
            dist.all_reduce(grad_hidden, op=dist.ReduceOp.SUM, group=ctx.tp_group)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(ctx.hidden_dtype)
        return grad_hidden, grad_weight if sink is None else sink.added(), *(None,) * 9


def _all_rows(own: Tensor, rows_of_ranks: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """Send this rank's rows to all, and take in theirs -> [N, H], in the order of ranks.

    By broadcasts, for the ranks have unequal numbers of rows, and gloo gathers equal ones alone.
    """
    together = own.new_empty(sum(rows_of_ranks), own.shape[1])
    parts = torch.split(together, list(rows_of_ranks))
    parts[dist.get_rank(group)].copy_(own)
    for rank, part in enumerate(parts):
        if part.shape[0]:
            dist.broadcast(part, group=group, group_src=rank)
    return together


def _own_sum(partial: Tensor, rows_of_ranks: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """Sum each rank's rows on that rank, the transpose of `_all_rows`; overwrites [N, H] -> this rank's rows."""
    parts = torch.split(partial, list(rows_of_ranks))
    for rank, part in enumerate(parts):
        if part.shape[0]:
            dist.reduce(part, op=dist.ReduceOp.SUM, group=group, group_dst=rank)
    return parts[dist.get_rank(group)]


def column_blocks(
    num_columns: int, num_tokens: int, chunk_size: int, *, device_type: str
) -> tuple[list[slice], int, int]:
    """Cut the columns into blocks -> (the blocks, how many of the last are kept, columns of the largest)."""
    on_cpu = device_type == "cpu"
    fitting = max(1, min(chunk_size * num_columns // max(num_tokens, 1), num_columns))
    num_buffers = min(NUM_BUFFERS["cpu" if on_cpu else "cuda"], fitting)
    size, rest = fitting // num_buffers, 0
    if not on_cpu:  # the last blocks are kept: a short one comes first
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        rest = num_columns % size
    return [slice(0, rest)][: min(rest, 1)] + slices(rest, num_columns, size), num_buffers, size


def spare_blocks(columns: list[slice], size: int, num_tokens: int, *, hidden_size: int) -> int:
    """Count the last blocks whose logits fit the weight's gradient in front of their own rows of it -> blocks."""
    fitting = [
        number
        for number, block in enumerate(reversed(columns), start=1)
        if number * size * num_tokens <= block.start * hidden_size
    ]
    return max(fitting, default=0)


class _LogitBlocks:
    """Logits by blocks of columns, in a ring of buffers: what forward leaves in it, backward has for nothing."""

    def __init__(
        self, weight: Tensor, num_tokens: int, chunk_size: int, softcap: float | None, *, spare: Tensor | None = None
    ) -> None:
        self.precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
        columns, num_buffers, size = column_blocks(
            weight.shape[0], num_tokens, chunk_size, device_type=weight.device.type
        )
        self.columns = columns if num_tokens else []
        self.passes = _choose_passes(weight, num_tokens=num_tokens, block_size=size, softcap=softcap)
        self._first_held = len(self.columns)
        # Once, not once a block: on a CPU the first touch of fresh pages costs more than the arithmetic done on them.
        self._ring = weight.new_empty(num_buffers, size * num_tokens)
        # Backward begins with the last blocks: as many lie in `spare` as end before their own rows of it begin.
        self._spare = weight.new_empty(0, size * num_tokens)
        if spare is not None and num_tokens:
            slots = spare.view(-1)
            num_spare = spare_blocks(self.columns, size, num_tokens, hidden_size=weight.shape[1])
            self._spare = slots[: num_spare * size * num_tokens].view(num_spare, size * num_tokens)

    def keep(self) -> "_LogitBlocks":
        """Take note that the buffers hold the logits of the last blocks -> self."""
        self._first_held = len(self.columns) - len(self._spare) - len(self._ring)
        return self

    def logits(self, index: int, weight: Tensor, inputs: Tensor) -> Tensor:
        """Compute block `index` in the weight's dtype, unless a buffer holds it -> [C, N], the buffer itself."""
        weight = weight[self.columns[index]]
        num_columns, num_tokens = weight.shape[0], inputs.shape[0]
        slot = index - (len(self.columns) - len(self._spare))
        buffer = (self._spare[slot] if slot >= 0 else self._ring[index % len(self._ring)])[: num_columns * num_tokens]
        logits_CN = (
            buffer.view(num_columns, num_tokens)
            if self.passes.tokens_adjoin
            else buffer.view(num_tokens, num_columns).T
        )
        return torch.mm(weight, inputs.T, out=logits_CN) if index < self._first_held else logits_CN


def _choose_passes(weight: Tensor, *, num_tokens: int, block_size: int, softcap: float | None) -> "Passes":
    """Take the fused kernels on a GPU that can run them, torch's operators elsewhere; both round alike."""
    if weight.is_cuda and weight.dtype != torch.float64 and _kernels_lack() is None:
        from megatron_sppo.objective.log_ratio_kernels import KernelPasses

        return KernelPasses(softcap)
    return TorchPasses(weight, num_tokens=num_tokens, block_size=block_size, softcap=softcap)


@cache
def _kernels_lack() -> str | None:
    """Say what Triton misses on this machine, once aloud -> None if nothing. It builds a launcher in C at first use."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    needs = {
        "triton": find_spec("triton"),
        "a C compiler": compiler,
        str(header): header.exists(),
        _DRIVER: _can_be_loaded(_DRIVER),
    }
    missing = next((name for name, found in needs.items() if not found), None)
    if missing is not None:
        logger.warning(
            "The head takes torch's own operators, slower and with the same results: %s is missing. Install it "
            "(pip install triton, apt-get install gcc python3-dev).",
            missing,
        )
    return missing


def _can_be_loaded(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, whose precision the device sums in where it can."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif (
        total.device.type == "cpu"
    ):  # no CPU kernel multiplies bfloat16 into float32: each product is rounded once, then added
        total.add_(left @ right)
    elif _adds_to_float32(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


@cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Ask torch whether a narrow product can be added to a float32 total: from 2.11 on; before, `addmm` refuses it."""
    narrow, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, narrow, narrow, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True
