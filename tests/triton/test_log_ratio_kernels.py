"""Proves the head's Triton kernels in Triton's interpreter, on a CPU: float64's values and gradients.

Run by `make test-triton`, which gives this folder a Triton of its own (vLLM for the CPU cannot live beside one).
Does not prove that the kernels compile for a GPU or how fast they are: tests/gpu and benchmarks/head_gpu.py.
"""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_sppo.objective import log_ratio, log_ratio_kernels
from megatron_sppo.objective.log_ratio_kernels import KernelPasses
from megatron_sppo.objective.log_ratio_passes import TorchPasses
from tests.distributed.harness import run_ranks
from tests.unit.objective.test_log_ratio import TRUE_V, H, V, naive, ours, problem

N = 11

assert os.environ.get("TRITON_INTERPRET") == "1"

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""As in test_log_ratio.py, where torch's operators are held against the same formula."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Choose the kernels on this CPU, and let a program take 16 columns at a time: several, and a rest."""
    choose_kernels(monkeypatch.setattr)


def choose_kernels(setattr=setattr):
    setattr(log_ratio, "_choose_passes", lambda weight, *, softcap, **sizes: KernelPasses(softcap))
    setattr(log_ratio_kernels, "_COLUMNS", 16)


def assert_close(found, expected, tolerance):
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=tolerance * 2, rtol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "chunk_size", "softcap"),
    [(torch.float32, 4, 2.0), (torch.bfloat16, 1000, 2.0), (torch.float32, 1000, None), (torch.bfloat16, 4, None)],
)
def test_values_and_gradients_are_those_of_the_formula_in_float64(dtype, chunk_size, softcap):
    """11 tokens, 59 of 64 columns true, in blocks of 2 (a ring of 8 of them) or of 7; a program takes at most 16."""
    inputs = problem(dtype, num_tokens=N)
    found = ours(*inputs, chunk_size=chunk_size, vocab_size=TRUE_V, logit_softcap=softcap)
    assert (found[2][TRUE_V:] == 0).all()
    assert_close(found, naive(*inputs, softcap=softcap), TOLERANCES[dtype])


def test_a_program_as_wide_as_on_a_gpu(monkeypatch):
    """4101 true columns: one whole program of 4096 and one of 5."""
    monkeypatch.setattr(log_ratio_kernels, "_COLUMNS", 4096)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, H, generator=generator)
    weight = torch.randn(4224, H, generator=generator)
    inputs = hidden, weight, torch.tensor([0, 4095, 4096, 4100, 17]), torch.ones(5, dtype=torch.float64)
    found = ours(*inputs, chunk_size=1000, vocab_size=4101)
    assert_close(found, naive(*inputs, vocab_size=4101), 1e-5)


def test_float32_is_kept_for_large_logits():
    """Logits of +-400, -800 nats: the maximum is taken out, as by torch's operators."""
    inputs = problem(torch.float32, num_tokens=N, scale=100.0)
    found, expected = ours(*inputs, chunk_size=4, vocab_size=TRUE_V), naive(*inputs)
    torch.testing.assert_close(found[0].double(), expected[0], atol=1e-3, rtol=1e-6)
    torch.testing.assert_close(found[1].double(), expected[1], atol=1e-2, rtol=1e-3)


def test_a_nearly_certain_label_keeps_its_small_gradient():
    """Logits 0 and -20: 1 - p is 2.06e-9, or 0 with p in float32; grad_hidden is (1 - p) (w_0 - w_1), 20 times it."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [-20.0]])
    _, grad_hidden, _ = ours(hidden, weight, torch.tensor([0]), torch.ones(1))
    torch.testing.assert_close(grad_hidden, torch.tensor([[20 / (1 + torch.e**20)]]), rtol=1e-5, atol=0.0)


def test_labels_outside_the_vocabulary_give_nan_and_spare_their_neighbours():
    hidden, weight, labels, upstream = problem(torch.float32, num_tokens=N)
    expected = ours(hidden, weight, labels, upstream, vocab_size=TRUE_V)
    labels = labels.clone()
    labels[3], labels[5], labels[7] = TRUE_V, -100, V + 10
    found = ours(hidden, weight, labels, upstream, vocab_size=TRUE_V)
    outside = torch.zeros(N, dtype=torch.bool)
    outside[[3, 5, 7]] = True
    assert found[0][outside].isnan().all()
    for mine, true in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(mine[~outside], true[~outside])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_each_pass_is_torch_s_pass_but_for_rounding(softcap):
    """A block in the middle of the vocabulary: labels before, in and behind it, a maximum already found; float32."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_columns, first = 13, 21, 1000
    logits = 4 * torch.randn(num_columns, num_tokens, generator=generator)
    labels = first + torch.arange(num_tokens) * 3 - 7
    weight = torch.zeros(num_columns, 1)
    torch_passes = TorchPasses(weight, num_tokens=num_tokens, block_size=num_columns, softcap=softcap)
    answers = []
    for passes in (torch_passes, KernelPasses(softcap)):
        block = logits.clone() if passes.tokens_adjoin else logits.T.contiguous().T
        maximum, sums = (
            torch.linspace(-3, 3, num_tokens),
            torch.stack([torch.full((num_tokens,), 1.5), torch.zeros(num_tokens)]),
        )
        maximum = passes.accumulate(block, labels, first, maximum, sums)
        grad, label_gradient = torch.linspace(-1, 1, num_tokens), torch.linspace(2, 3, num_tokens)
        passes.differentiate_(block, labels, first, sums[0].log() + maximum, grad, label_gradient)
        answers.append((maximum, sums, block))
    local = (labels >= first) & (labels < first + num_columns)
    assert 0 < local.sum() < num_tokens
    assert (answers[0][1][1][~local] == 0).all()
    for mine, true in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(mine, true, atol=1e-6, rtol=2e-6)


def sharded(dtype):
    """One rank of two."""
    choose_kernels()
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, weight, labels, upstream = problem(dtype, num_tokens=N)
    shard = weight[rank * V // 2 : (rank + 1) * V // 2]
    found = ours(hidden, shard, labels, upstream, tp_group=group, chunk_size=4, vocab_size=TRUE_V)
    dist.destroy_process_group()
    return found


def test_two_vocabulary_shards_equal_the_whole_weight():
    results = run_ranks(sharded, 2, torch.float32)
    expected = naive(*problem(torch.float32, num_tokens=N))
    for log_prob, grad_hidden, _ in results:
        assert_close((log_prob, grad_hidden), expected[:2], 1e-5)
    assert_close([torch.cat([shard for *_, shard in results])], expected[2:], 1e-5)
