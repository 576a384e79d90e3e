"""The head on an emulated GPU: no Triton is there, so torch's passes run, and products are summed in float32.

Values are float64's, within bfloat16; that CUDA's kernels compute the same is tests/gpu's to show.
"""

import pytest
import torch

from megatron_sppo.objective import log_ratio
from megatron_sppo.objective.log_ratio_passes import TorchPasses
from tests.unit.objective.test_log_ratio import TRUE_V, H, Sum, V, naive, ours, problem


@pytest.fixture(autouse=True)
def _fresh_answers():
    log_ratio._adds_to_float32.cache_clear()
    yield
    log_ratio._adds_to_float32.cache_clear()


def run(num_tokens=300):
    """Go there and back on the GPU -> log-probabilities, gradient of hidden, float32 total of the weight's gradient."""
    sink = Sum(torch.zeros(V, H, device="cuda"))
    inputs = [tensor.cuda() for tensor in problem(torch.bfloat16, num_tokens=num_tokens)]
    *found, _ = ours(*inputs, chunk_size=8, vocab_size=TRUE_V, weight_gradient=sink)
    return [tensor.cpu() for tensor in (*found, sink.total)]


def test_without_triton_torch_s_passes_compute_the_formula():
    weight = torch.zeros(V, H, dtype=torch.bfloat16, device="cuda")
    assert isinstance(log_ratio._choose_passes(weight, num_tokens=1, block_size=V, softcap=None), TorchPasses)
    for mine, true in zip(run(37), naive(*problem(torch.bfloat16, num_tokens=37)), strict=True):
        torch.testing.assert_close(mine.double(), true, atol=8e-2, rtol=4e-2)


def test_a_torch_whose_addmm_refuses_a_float32_total_gives_the_same_bits(monkeypatch):
    """torch 2.9 and 2.10: "self and mat2 must have the same dtype". `mm` has `out_dtype` there, and its sum is exact.

    1e-6 of float32's sums is far below the 2^-9 that a product rounded to bfloat16 would be off by.
    """
    expected = run()

    def refuse(*_, **__):
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    log_ratio._adds_to_float32.cache_clear()
    monkeypatch.setattr(torch, "addmm", refuse)
    for mine, true in zip(run(), expected, strict=True):
        assert torch.equal(mine, true)
    left, right = torch.randn(2, 64, 64, device="cuda").bfloat16()
    total = torch.zeros(64, 64, device="cuda")
    log_ratio._add_product_(total, left, right)
    torch.testing.assert_close(total.cpu().double(), left.cpu().double() @ right.cpu().double(), atol=1e-5, rtol=1e-6)
