"""Proves the budget of the head on a GPU, as log_ratio.py states it: operations, bytes moved, bytes held.

The products and every allocation are those of the head itself at its real size, on tensors without memory (meta); what
a kernel moves is counted from its own loads and stores in Triton's interpreter. The roofline of an H100 turns them into
time. It does not prove that cuBLAS and the kernels reach the roofline: benchmarks/head_gpu.py measures that.
"""

from collections import Counter
from functools import cache
from typing import ClassVar

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from megatron_sppo.objective import linear_log_probs, log_ratio
from megatron_sppo.objective.log_ratio_kernels import KernelPasses
from tests.memory import LiveBytes

HIDDEN, VOCAB = 4096, 128256
FLOPS, BYTES = 989e12, 3.35e12
"""An H100's, per second: dense bfloat16, and its memory's."""
MIB = 1 << 20


class Budget(LiveBytes):
    """Counts multiplications of every product too."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = [tensor for tensor in args if isinstance(tensor, torch.Tensor)][-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return super().__torch_dispatch__(func, types, args, kwargs)


def kernel_bytes(monkeypatch, *, num_tokens=2, num_columns=4096):
    """Run both kernels -> bytes moved per logit by step, from the masks of their loads and stores."""
    moved = Counter()

    def counted(operation, mask_at):
        def count(builder, pointers, *rest):
            moved[step] += int(rest[mask_at].data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return operation(builder, pointers, *rest)

        return count

    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(InterpreterBuilder, name, counted(getattr(InterpreterBuilder, name), mask_at))
    logits, labels = torch.zeros(num_tokens, num_columns).bfloat16().T, torch.arange(num_tokens)
    maximum, sums = torch.full((num_tokens,), -torch.inf), torch.zeros(2, num_tokens)
    step = "forward"
    KernelPasses(None).accumulate(logits, labels, 0, maximum, sums)
    step = "backward"
    KernelPasses(None).differentiate_(logits, labels, 0, *sums, maximum)
    return {step: count / (num_tokens * num_columns) for step, count in moved.items()}


class OnMeta:
    """Stands in for the kernels where there is no memory; counts the logits that each is given."""

    tokens_adjoin = KernelPasses.tokens_adjoin
    logits: ClassVar[Counter] = Counter()

    def accumulate(self, logits_CN, labels_N, first_column, maximum_N, sums_2N):
        assert logits_CN.stride(0) == 1
        self.logits["forward"] += logits_CN.numel()
        return maximum_N

    def differentiate_(self, logits_CN, *rest):
        self.logits["backward"] += logits_CN.numel()


class MainGrad:
    """Megatron's float32 buffer, which is there before and after."""

    def __init__(self):
        self.total = torch.empty(VOCAB, HIDDEN, device="meta")

    def added(self):
        return None


@cache
def run(num_tokens, *, in_training=False):
    """Go forward and backward at the real size -> (Budget, logits that each kernel was given)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_ratio, "_choose_passes", lambda weight, **sizes: OnMeta())
        patch.setattr(OnMeta, "logits", Counter())
        hidden, weight = (
            torch.empty(rows, HIDDEN, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for rows in (num_tokens, VOCAB)
        )
        labels = torch.empty(num_tokens, device="meta", dtype=torch.int64)
        main_grad = MainGrad() if in_training else None
        with Budget() as budget:
            log_prob = linear_log_probs(hidden, weight, labels, weight_gradient=main_grad)
            torch.autograd.grad(log_prob.sum(), (hidden, weight), allow_unused=True)
        return budget, OnMeta.logits


def test_kernels_move_each_logit_three_times(monkeypatch):
    """2 bytes in forward, 2 + 2 in backward, and at most 40 bytes a token and program beside 4096 logits."""
    moved = kernel_bytes(monkeypatch)
    assert moved == {"forward": pytest.approx(2, abs=0.01), "backward": pytest.approx(4, abs=0.01)}
    assert min(moved.values()) >= 2


@pytest.mark.parametrize(
    ("num_tokens", "in_training", "expected"),
    [(8192, True, 1.288), (32768, True, 1.376), (8192, False, 1.230), (32768, False, 1.347)],
)
def test_time_by_the_roofline_is_that_of_three_products_and_what_is_not_kept(
    num_tokens, in_training, expected, monkeypatch
):
    """(4 - f) / 3 + 6 N V / 3.35e12 / (6 N H V / 989e12); all but the second within the 1.35 that is allowed.

    f is 45056 of 128256 columns and 11264; without Megatron's buffer 22528 and 11264 more.
    """
    budget, logits = run(num_tokens, in_training=in_training)
    assert logits == {"forward": num_tokens * VOCAB, "backward": num_tokens * VOCAB}
    moved = kernel_bytes(monkeypatch)
    seconds = 2 * budget.multiplications / FLOPS + sum(logits[step] * moved[step] for step in logits) / BYTES
    three_products = 3 * 2 * num_tokens * HIDDEN * VOCAB / FLOPS
    assert seconds / three_products == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("num_tokens", [8192, 32768])
def test_at_most_a_gibibyte_is_held_over_the_gradients(num_tokens):
    """The ring of 704 MiB, and float32 in place of bfloat16 for the hidden states' gradient: 2 N H bytes."""
    budget, _ = run(num_tokens)
    gradients = 2 * HIDDEN * (num_tokens + VOCAB)
    expected = 704 * MIB + 2 * num_tokens * HIDDEN
    assert budget.peak - gradients == pytest.approx(expected, abs=16 * MIB)
    assert budget.peak - gradients <= 1024 * MIB


def test_a_product_of_64_cubed_is_counted():
    with Budget() as budget:
        one = torch.empty(64, 64, device="meta")
        torch.mm(one, one)
        torch.addmm(one, one, one)
    assert budget.multiplications == 2 * 64**3
