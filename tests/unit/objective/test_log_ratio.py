"""Proves the head against log_softmax + gather: values, gradients, padding, softcap, shards over 2 gloo ranks, memory.

Does not prove speed, nor anything on a GPU: see benchmarks/ and tests/gpu.
"""

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sppo.objective import linear_log_probs, log_ratio, sequence_sums
from megatron_sppo.objective.log_ratio import default_chunk_size
from tests.distributed.harness import run_ranks

N, H, V, TRUE_V = 37, 16, 64, 59


def problem(dtype=torch.float64, num_tokens=N, scale=1.0):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = (torch.randn(num_tokens, H, generator=generator, dtype=torch.float64) * scale).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(TRUE_V, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    return hidden, weight, labels, upstream


def naive(hidden, weight, labels, upstream, vocab_size=TRUE_V, softcap=None):
    """log_softmax over the true columns, gather, autograd -> log-probs, dhidden, dweight; all kept in float64."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = hidden @ weight[:vocab_size].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_prob = torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0]
    (log_prob * upstream).sum().backward()
    return log_prob.detach(), hidden.grad, weight.grad


def ours(hidden, weight, labels, upstream, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_prob = linear_log_probs(hidden, weight, labels, **options)
    (log_prob * upstream.to(log_prob.dtype)).sum().backward()
    return log_prob.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_size", [1, 8, N, 1000, None])
def test_values_and_gradients_equal_log_softmax_in_float64(chunk_size):
    inputs = problem()
    for actual, expected in zip(ours(*inputs, chunk_size=chunk_size, vocab_size=TRUE_V), naive(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 8, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_softcapped_logits_equal_autograd_of_the_formula(dtype, tolerance, chunk_size):
    """Gemma 2: c tanh(x / c). At c = 2 and logits of size 4 most of tanh is bent."""
    inputs = problem(dtype)
    actual = ours(*inputs, chunk_size=chunk_size, vocab_size=TRUE_V, logit_softcap=2.0)
    assert (actual[0] - naive(*inputs)[0]).abs().max() > 1
    for found, expected in zip(actual, naive(*inputs, softcap=2.0), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=tolerance * 2, rtol=tolerance)


def test_backward_may_be_taken_twice():
    """The second time no block of logits is left from forward."""
    hidden, weight, labels, upstream = problem()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    log_prob = linear_log_probs(hidden, weight, labels, vocab_size=TRUE_V, chunk_size=8)
    first = torch.autograd.grad(log_prob, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(log_prob, (hidden, weight), upstream)
    for one, two, expected in zip(first, second, naive(hidden, weight, labels, upstream)[1:], strict=True):
        torch.testing.assert_close(one, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(two, expected, atol=1e-12, rtol=1e-12)


class Sum:
    """A float32 buffer as the place of the weight's gradient."""

    def __init__(self, total):
        self.total, self.times = total, 0

    def added(self):
        self.times += 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_weight_gradient_is_added_to_a_float32_buffer(dtype, tolerance):
    """Three micro-batches on top of ones; padding columns keep their ones. Autograd gets nothing."""
    sink, expected = Sum(torch.ones(V, H)), torch.ones(V, H, dtype=torch.float64)
    for num_tokens in (N, 5, 0):
        inputs = problem(dtype, num_tokens=num_tokens)
        _, grad_hidden, grad_weight = ours(*inputs, chunk_size=8, vocab_size=TRUE_V, weight_gradient=sink)
        _, expected_hidden, increment = naive(*inputs)
        expected += increment
        assert grad_weight is None
        torch.testing.assert_close(grad_hidden.double(), expected_hidden, atol=tolerance * 2, rtol=tolerance)
    assert sink.times == 3
    torch.testing.assert_close(sink.total.double(), expected, atol=tolerance * 2, rtol=tolerance)


def test_buffer_keeps_increments_that_bfloat16_would_lose():
    """A total of 1024 steps by 8 in bfloat16; gradients here are of size 1."""
    inputs = problem(torch.bfloat16)
    sink = Sum(torch.full((V, H), 1024.0))
    ours(*inputs, vocab_size=TRUE_V, weight_gradient=sink)
    torch.testing.assert_close((sink.total - 1024).double(), naive(*inputs)[2], atol=8e-2, rtol=4e-2)


def test_gradients_pass_gradcheck():
    hidden, weight, labels, _ = problem(num_tokens=5)
    hidden, weight = (tensor[:, :4].clone().requires_grad_() for tensor in (hidden, weight))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, labels, chunk_size=2, vocab_size=TRUE_V), (hidden, weight)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_values_and_gradients_in_working_precision(dtype, tolerance):
    """float32: rounding of a 16-term dot product. bfloat16: logits of size ~8 step by 2^-5."""
    inputs = problem(dtype)
    log_prob, grad_hidden, grad_weight = ours(*inputs, chunk_size=8, vocab_size=TRUE_V)
    assert (log_prob.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, dtype, dtype)
    for actual, expected in zip((log_prob, grad_hidden, grad_weight), naive(*inputs), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=tolerance * 2, rtol=tolerance)


def test_float32_is_kept_for_large_logits():
    """Logits of +-400: exp overflows without the maximum taken out; -800 nats come out to float32's own rounding."""
    inputs = problem(torch.float32, scale=100.0)
    log_prob, grad_hidden, _ = ours(*inputs, chunk_size=8, vocab_size=TRUE_V)
    expected, expected_grad, _ = naive(*inputs)
    assert expected.min() < -500
    torch.testing.assert_close(log_prob.double(), expected, atol=1e-3, rtol=1e-6)
    assert torch.isfinite(grad_hidden).all()
    torch.testing.assert_close(grad_hidden.double(), expected_grad, atol=1e-2, rtol=1e-3)


def test_padded_columns_never_enter():
    """Huge or even NaN padding rows change no bit, and get exactly no gradient."""
    hidden, weight, labels, upstream = problem(torch.float32)
    poisoned = weight.clone()
    poisoned[TRUE_V:] = torch.nan
    clean = ours(hidden, weight, labels, upstream, vocab_size=TRUE_V)
    dirty = ours(hidden, poisoned, labels, upstream, vocab_size=TRUE_V)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (dirty[2][TRUE_V:] == 0).all()


def test_labels_outside_the_vocabulary_give_nan_and_spare_their_neighbours():
    hidden, weight, labels, upstream = problem(torch.float32)
    expected = ours(hidden, weight, labels, upstream, vocab_size=TRUE_V)[0]
    labels = labels.clone()
    labels[3], labels[5], labels[7] = TRUE_V, -100, V + 10
    log_prob = ours(hidden, weight, labels, upstream, vocab_size=TRUE_V)[0]
    outside = torch.zeros(N, dtype=torch.bool)
    outside[[3, 5, 7]] = True
    assert log_prob[outside].isnan().all()
    assert torch.equal(log_prob[~outside], expected[~outside])


def test_inputs_need_not_be_contiguous():
    hidden, weight, labels, upstream = problem()
    wide_hidden, wide_weight = torch.randn(H, N, dtype=torch.float64).T, torch.empty(V, 2 * H, dtype=torch.float64)
    wide_hidden.copy_(hidden)
    wide_weight[:, ::2] = weight
    wide_labels = torch.stack([labels, labels], dim=1)[:, 0]
    assert not (wide_hidden.is_contiguous() or wide_weight[:, ::2].is_contiguous() or wide_labels.is_contiguous())
    for actual, expected in zip(
        ours(wide_hidden, wide_weight[:, ::2], wide_labels, upstream, chunk_size=5, vocab_size=TRUE_V),
        naive(hidden, weight, labels, upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_no_rows_give_no_values_and_zero_gradients():
    log_prob, grad_hidden, grad_weight = ours(*problem(torch.float32, num_tokens=0), vocab_size=TRUE_V)
    assert log_prob.shape == (0,) and log_prob.dtype == torch.float32
    assert grad_hidden.shape == (0, H)
    assert torch.equal(grad_weight, torch.zeros(V, H))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen):
    hidden, weight, labels, upstream = problem()
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    (linear_log_probs(hidden, weight, labels, vocab_size=TRUE_V) * upstream).sum().backward()
    _, expected_hidden, expected_weight = naive(hidden.detach(), weight.detach(), labels, upstream)
    if frozen == "hidden":
        assert hidden.grad is None
        torch.testing.assert_close(weight.grad, expected_weight)
    else:
        assert weight.grad is None
        torch.testing.assert_close(hidden.grad, expected_hidden)


def test_only_hidden_weight_labels_and_two_floats_a_token_are_kept_for_backward():
    """Saved bytes beyond the inputs: 8 N. A [N, V] float32 would be 32 times that here."""
    hidden, weight, labels, _ = problem(torch.float32, num_tokens=512)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    known = {tensor.data_ptr() for tensor in (hidden, weight, labels)}
    extra = []

    def note(tensor):
        if tensor.data_ptr() not in known:
            extra.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear_log_probs(hidden, weight, labels, chunk_size=64, vocab_size=TRUE_V)
    assert extra == [8 * 512]


def test_no_tensor_larger_than_a_chunk_of_logits_is_made():
    """Every operator's output is watched, forward and backward: a chunk's logits or an input's gradient at most."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (result if isinstance(result, tuple | list) else [result])
                           if isinstance(t, torch.Tensor))  # fmt: skip
            return result

    num_tokens, chunk_size = 1024, 32
    hidden, weight, labels, _ = problem(torch.float32, num_tokens=num_tokens)
    with Watch():
        ours(hidden, weight, labels, torch.ones(num_tokens), chunk_size=chunk_size)
    assert max(largest) == max(chunk_size * V, num_tokens * H, V * H) < num_tokens * V


def test_default_chunk_fits_its_budget():
    """V = 128256, bfloat16: 128 MiB / (2 * 128256) = 523 tokens -> 512; 704 MiB -> 2877 -> 2864, 16 * 179."""
    assert default_chunk_size(128256, 2, device_type="cpu") == 512
    assert default_chunk_size(128256, 4, device_type="cpu") == 256
    assert default_chunk_size(128256, 2, device_type="cuda") == 2864
    assert default_chunk_size(1 << 40, 2, device_type="cpu") == 16


def sharded(dtype, num_tokens, vocab_size):
    """One rank of two: its shard's results, and the whole weight's gradient gathered."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, weight, labels, upstream = problem(dtype, num_tokens=num_tokens)
    labels = labels % vocab_size
    shard = weight[rank * V // 2 : (rank + 1) * V // 2]
    log_prob, grad_hidden, grad_shard = ours(
        hidden, shard, labels, upstream, tp_group=group, chunk_size=8, vocab_size=vocab_size
    )
    dist.destroy_process_group()
    return log_prob, grad_hidden, grad_shard


@pytest.mark.parametrize("vocab_size", [TRUE_V, V, V // 2, V // 2 - 3])
def test_two_vocabulary_shards_equal_the_whole_weight(vocab_size):
    """float64, to rounding. The last two vocabularies leave rank 1 with nothing but padding."""
    results = run_ranks(sharded, 2, torch.float64, N, vocab_size)
    hidden, weight, labels, upstream = problem()
    log_prob, grad_hidden, grad_weight = naive(hidden, weight, labels % vocab_size, upstream, vocab_size=vocab_size)
    for rank in range(2):
        torch.testing.assert_close(results[rank][0], log_prob, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(results[rank][1], grad_hidden, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.cat([results[0][2], results[1][2]]), grad_weight, atol=1e-12, rtol=1e-12)
    assert torch.equal(results[0][0], results[1][0])


def test_two_shards_in_bfloat16_and_without_rows():
    inputs = problem(torch.bfloat16)
    expected = naive(*inputs)
    results = run_ranks(sharded, 2, torch.bfloat16, N, TRUE_V)
    torch.testing.assert_close(results[0][0].double(), expected[0], atol=8e-2, rtol=4e-2)
    torch.testing.assert_close(results[0][1].double(), expected[1], atol=8e-2, rtol=4e-2)
    for log_prob, grad_hidden, grad_shard in run_ranks(sharded, 2, torch.float32, 0, TRUE_V):
        assert log_prob.shape == (0,) and grad_hidden.shape == (0, H)
        assert torch.equal(grad_shard, torch.zeros(V // 2, H))


def test_sequence_sums_round_once():
    """4096 x -10.4 (the float32 nearest to it): a running float32 sum is off by 0.6 nats, one rounding by none."""
    value = torch.tensor(-10.4)
    sums = sequence_sums(value.repeat(4096), torch.zeros(4096, dtype=torch.int64), 1)
    assert float(sums) == 4096 * float(value)


def test_sequence_sums_add_up_and_give_zero_without_rows():
    """Sequence 0: 1 + 2, sequence 2: 4; sequence 1 has no rows."""
    sums = sequence_sums(torch.tensor([1.0, 4.0, 2.0]), torch.tensor([0, 2, 0]), 3)
    assert sums.tolist() == [3.0, 0.0, 4.0]
    assert sequence_sums(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0).shape == (0,)
    with pytest.raises(AssertionError):
        sequence_sums(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64), 1)


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True


def choose(monkeypatch, dtype=torch.bfloat16):
    """Let the head choose its passes for a weight on a GPU, with a stand-in for the kernels -> their class."""
    kernels = SimpleNamespace(KernelPasses=type("KernelPasses", (), {"__init__": lambda self, softcap: None}))
    monkeypatch.setitem(sys.modules, "megatron_sppo.objective.log_ratio_kernels", kernels)
    log_ratio._kernels_lack.cache_clear()
    weight = torch.zeros(4, 4, dtype=dtype).as_subclass(OnGpu)
    passes = log_ratio._choose_passes(weight, num_tokens=1, block_size=4, softcap=None)
    log_ratio._kernels_lack.cache_clear()
    return type(passes).__name__


@pytest.mark.parametrize(
    ("missing", "dtype", "expected"),
    [
        (None, torch.bfloat16, "KernelPasses"),
        (None, torch.float32, "KernelPasses"),
        (None, torch.float64, "TorchPasses"),
        ("triton", torch.bfloat16, "TorchPasses"),
        ("a C compiler", torch.bfloat16, "TorchPasses"),
        ("Python.h", torch.bfloat16, "TorchPasses"),
        ("libcuda.so.1", torch.bfloat16, "TorchPasses"),
    ],
)
def test_a_gpu_takes_the_kernels_unless_something_is_missing_which_is_said(
    missing, dtype, expected, monkeypatch, tmp_path, caplog
):
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    headers = tmp_path / "nowhere" if missing == "Python.h" else tmp_path
    monkeypatch.setattr(log_ratio, "find_spec", lambda name: None if missing == name else object())
    monkeypatch.setattr(log_ratio.shutil, "which", lambda name: None if missing == "a C compiler" else f"/bin/{name}")
    monkeypatch.setattr(log_ratio, "_can_be_loaded", lambda library: missing != library)
    monkeypatch.setattr(log_ratio.sysconfig, "get_paths", lambda: {"include": str(headers)})
    assert choose(monkeypatch, dtype) == expected
    assert (f"{missing} is missing" in caplog.text) == (missing is not None)


def test_the_cpu_never_looks_for_kernels(monkeypatch):
    monkeypatch.setattr(log_ratio, "find_spec", None)
    passes = log_ratio._choose_passes(torch.zeros(4, 4), num_tokens=1, block_size=4, softcap=None)
    assert type(passes).__name__ == "TorchPasses"


ROWS_OF_RANKS = (5, 0, 2)
"""Of three ranks: one has most rows, one none."""


def sequence_parallel(rows_of_ranks):
    """One rank of three: it brings its own rows, has a third of the vocabulary, and counts what it sends."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, weight, labels, upstream = problem(torch.float32, num_tokens=sum(rows_of_ranks))
    shard = weight[:63].split(21)[rank]
    sent = Counter()

    class CountBytes(TorchDispatchMode):
        """Of every collective's tensor: who sends it, or for whom it is summed; reductions to all."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                tensor = args[0][0]
                root = args[3] if func.overloadpacket._qualified_op_name == "c10d::reduce_" else args[2]
                name = func.overloadpacket._qualified_op_name
                sent[name, root if name != "c10d::allreduce_" else None] += tensor.nbytes
            return func(*args, **(kwargs or {}))

    with CountBytes():
        found = ours(
            hidden.split(rows_of_ranks)[rank],
            shard,
            labels,
            upstream,
            tp_group=group,
            chunk_size=8,
            vocab_size=TRUE_V,
            rows_of_ranks=rows_of_ranks,
        )
    dist.barrier()  # the first rank keeps the store, which the others may still be reading
    dist.destroy_process_group()
    return *found, sent


def test_sequence_parallel_ranks_send_their_own_rows_alone_and_get_those_rows_gradient():
    """Values and gradients are the whole weight's. Sent: 4 H bytes a row by its owner, and back to it in float32.

    The rest is the softmax's: maximum (4 bytes a row), sum and label's logit (8).
    """
    results = run_ranks(sequence_parallel, len(ROWS_OF_RANKS), ROWS_OF_RANKS)
    log_prob, grad_hidden, grad_weight = naive(*problem(torch.float32, num_tokens=sum(ROWS_OF_RANKS)))
    for (mine, grad, _, sent), expected in zip(results, grad_hidden.split(ROWS_OF_RANKS), strict=True):
        torch.testing.assert_close(mine.double(), log_prob, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(grad.double(), expected, atol=2e-5, rtol=1e-5)
        assert sent == {
            **{
                (f"c10d::{name}_", rank): 4 * H * ROWS_OF_RANKS[rank]
                for name in ("broadcast", "reduce")
                for rank in (0, 2)
            },
            ("c10d::allreduce_", None): (4 + 8) * sum(ROWS_OF_RANKS),
        }
    found = torch.cat([grad_shard for _, _, grad_shard, _ in results])
    torch.testing.assert_close(found.double(), grad_weight[:63], atol=2e-5, rtol=1e-5)


def test_sequence_parallel_ranks_without_rows_send_nothing():
    for log_prob, grad_hidden, _, sent in run_ranks(sequence_parallel, 3, (0, 0, 0)):
        assert log_prob.shape == (0,) and grad_hidden.shape == (0, H) and not sent


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("num_tokens", "num_columns", "chunk_size", "num_spare"),
    [(50, 59, 1, 0), (5, 59, 1, 2), (3, 64, 1, 3), (40, 40, 30, 0)],
)
def test_blocks_of_a_gpu_and_logits_in_the_gradient_s_memory_change_no_value(
    num_tokens, num_columns, chunk_size, num_spare, softcap, monkeypatch
):
    """Blocks of 16 columns, the rest first: of 59 columns 11 + 3 x 16, a ring of two.

    The gradient has 16 numbers a row: 688 before the last block's row 43, where 16 logits of 43 tokens fit; 432 before
    row 27, for two blocks of 13 tokens; 176 before row 11, for three of 3. Backward is taken twice: the second time
    nothing is kept.
    """
    blocks, seen = log_ratio.column_blocks, []
    monkeypatch.setattr(log_ratio, "_ALIGNMENT", 16)
    monkeypatch.setattr(log_ratio, "column_blocks", lambda *sizes, device_type: blocks(*sizes, device_type="cuda"))
    monkeypatch.setattr(log_ratio, "_keeps_logits_in_gradient", lambda weight, sink: True)
    spare = log_ratio.spare_blocks
    monkeypatch.setattr(
        log_ratio, "spare_blocks", lambda *sizes, **hidden: seen.append(spare(*sizes, **hidden)) or seen[-1]
    )
    hidden, weight, labels, upstream = problem(num_tokens=num_tokens)
    labels = labels % num_columns
    expected = naive(hidden, weight, labels, upstream, vocab_size=num_columns, softcap=softcap)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    log_prob = linear_log_probs(
        hidden, weight, labels, vocab_size=num_columns, chunk_size=chunk_size, logit_softcap=softcap
    )
    first = torch.autograd.grad(log_prob, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(log_prob, (hidden, weight), upstream)
    assert seen == [num_spare]
    torch.testing.assert_close(log_prob.detach(), expected[0], atol=1e-12, rtol=1e-12)
    for gradients in (first, second):
        for mine, true in zip(gradients, expected[1:], strict=True):
            torch.testing.assert_close(mine, true, atol=1e-12, rtol=1e-12)
