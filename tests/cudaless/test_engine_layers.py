"""Norms, rotary embedding, the optimiser's kernels and the padding of experts, against float64 and TE's own Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.pytorch.attention.rope import RotaryPositionEmbedding, apply_rotary_pos_emb
from transformer_engine.pytorch.optimizers import (
    FusedAdam,
    multi_tensor_applier,
    multi_tensor_l2norm,
    multi_tensor_scale,
)
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

from tests.cudaless.engine.constants import DType
from tests.cudaless.engine.normalization import rmsnorm_fwd

E4M3 = DType.kFloat8E4M3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def assert_near(found: Tensor, wanted: Tensor, step: float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found.detach().cpu().double(), wanted, rtol=step, atol=atol)


# ---- Norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_centered_gamma", [False, True])
def test_rmsnorm_and_its_gradients_are_float64_s_rounded_once(zero_centered_gamma: bool) -> None:
    layer = te.RMSNorm(64, eps=1e-5, zero_centered_gamma=zero_centered_gamma, params_dtype=torch.bfloat16)
    layer.weight.data.copy_(normal(64, seed=1))
    rows, grad = normal(6, 5, 64).requires_grad_(), normal(6, 5, 64, seed=2)
    output = layer(rows)
    output.backward(grad)
    exact, weight = (tensor.detach().cpu().double().requires_grad_() for tensor in (rows, layer.weight))
    factor = weight + 1 if zero_centered_gamma else weight
    wanted = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * factor
    wanted.backward(grad.cpu().double())
    assert_near(output, wanted.detach(), 2**-8)
    assert_near(rows.grad, exact.grad, 2**-8, atol=1e-5)
    assert_near(layer.weight.grad, weight.grad, 2**-8, atol=1e-4)


def test_a_norm_casts_from_float32_under_delayed_scaling_and_from_bfloat16_under_current() -> None:
    """2.125 is half-way between E4M3's 2 (even) and 2.25; 2.125 + 2^-9 lies above, and is 2.125 in bfloat16.

    Rows of ones have root mean square 1, so that the norm gives its weight.
    """
    value = 2.125 + 2**-9
    weight = torch.ones(16).cuda()
    weight[0] = value
    arguments = torch.ones(16, 16).cuda(), weight, 0.0, None
    one = torch.ones(1).cuda()
    delayed, _, _ = rmsnorm_fwd(*arguments, Float8Quantizer(one, one.clone(), E4M3), DType.kBFloat16, 0, False)
    scaled = Float8CurrentScalingQuantizer(E4M3, torch.device("cuda"), force_pow_2_scales=True)
    current, _, _ = rmsnorm_fwd(*arguments, scaled, DType.kBFloat16, 0, False)
    assert delayed.dequantize(dtype=torch.float32)[0, 0].item() == 2.25
    assert current.dequantize(dtype=torch.float32)[0, 0].item() == 2.0


def test_a_norm_wants_a_weight_of_its_rows_type() -> None:
    with pytest.raises(RuntimeError, match=r"rmsnorm of \(4, 8\) torch.bfloat16 with a weight of torch.float32"):
        rmsnorm_fwd(normal(4, 8), torch.ones(8).cuda(), 1e-5, None, None, DType.kBFloat16, 0, False)


# ---- Rotary embedding ------------------------------------------------------------------------------------------------

HEADS, WIDTH = 2, 16
BOUNDS = [0, 12, 16, 40]  # multiples of 2 * 2 tokens, as two ranks of context parallelism want them


def table(length: int, width: int = WIDTH) -> Tensor:
    return RotaryPositionEmbedding(width)(length)


def turned(tensor: Tensor, grad: Tensor, freqs: Tensor, *, fused: bool, **settings: Any) -> tuple[Tensor, Tensor]:
    tensor = tensor.clone().requires_grad_()
    output = apply_rotary_pos_emb(tensor, freqs, fused=fused, **settings)
    output.backward(grad)
    return output.detach().cpu(), tensor.grad.cpu()


CASES: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "sbhd": ((10, 3, HEADS, WIDTH), WIDTH, {"tensor_format": "sbhd"}),
    "part of the head": ((10, 3, HEADS, WIDTH), WIDTH // 2, {"tensor_format": "sbhd"}),
    "thd": ((40, HEADS, WIDTH), WIDTH, {"tensor_format": "thd"}),
    **{
        f"thd, rank {rank} of 2": (
            (20, HEADS, WIDTH),
            WIDTH,
            {"tensor_format": "thd", "cp_size": 2, "cp_rank": rank},
        )
        for rank in (0, 1)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_fused_rotation_and_its_gradient_are_transformer_engine_s_unfused_ones(case: str) -> None:
    """In float32, where both round alike but for the order of two terms."""
    shape, width, settings = CASES[case]
    if settings["tensor_format"] == "thd":
        settings = {**settings, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32).cuda()}
    tensor, grad = normal(*shape, dtype=torch.float32), normal(*shape, dtype=torch.float32, seed=1)
    found, wanted = (turned(tensor, grad, table(64, width), fused=fused, **settings) for fused in (True, False))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def rotate(rows: int, bounds: list[int], lines: int, dtype: torch.dtype = torch.int32, **settings: Any) -> Tensor:
    cu_seqlens = torch.tensor(bounds, dtype=dtype).cuda()
    return apply_rotary_pos_emb(
        normal(rows, HEADS, WIDTH), table(lines), tensor_format="thd", fused=True, cu_seqlens=cu_seqlens, **settings
    )


def test_rows_behind_the_last_sequence_are_not_written() -> None:
    output = rotate(16, [0, 4, 12], 8).cpu()
    assert output[:12].isfinite().all() and output[12:].isnan().all()


REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "table too short": ("line 23 of a table of 23", lambda: rotate(40, BOUNDS, 23)),
    "table too short for all ranks' tokens": (
        "line 23 of a table of 12",
        lambda: rotate(20, BOUNDS, 12, cp_size=2, cp_rank=0),
    ),
    "int64": ("torch.int64, and the kernel reads int32", lambda: rotate(40, BOUNDS, 64, dtype=torch.int64)),
    "an odd part": ("cuts them in halves", lambda: rotate(3, [0, 6], 8, cp_size=2, cp_rank=0)),
    "a CPU table": (
        "illegal memory access",
        lambda: apply_rotary_pos_emb(normal(4, 1, HEADS, WIDTH), table(8).cpu(), fused=True),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_read_other_memory_is_refused(case: str) -> None:
    message, call = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- Optimiser -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adam_is_torch_s_in_float64(dtype: torch.dtype, adam_w_mode: bool) -> None:
    """Five steps with decay; bfloat16 parameters are their float32 masters, rounded."""
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    parameters = [normal(7, 5, dtype=dtype).requires_grad_(), normal(11, seed=1, dtype=dtype).requires_grad_()]
    exact = [parameter.detach().cpu().double().requires_grad_() for parameter in parameters]
    ours = FusedAdam(parameters, adam_w_mode=adam_w_mode, master_weights=dtype == torch.bfloat16, **settings)
    theirs = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(exact, **settings)
    for step in range(5):
        for index, (mine, true) in enumerate(zip(parameters, exact, strict=True)):
            mine.grad = normal(*mine.shape, seed=10 * step + index, dtype=dtype)
            true.grad = mine.grad.cpu().double()
        ours.step()
        theirs.step()
    for mine, true in zip(parameters, exact, strict=True):
        assert_near(mine, true.detach(), 1e-5 if dtype == torch.float32 else 2**-8, atol=1e-5)
        if dtype == torch.bfloat16:
            master = ours.state[mine]["master_param"]
            assert_near(master, true.detach(), 1e-5, atol=1e-5)
            assert torch.equal(master.cpu().bfloat16(), mine.detach().cpu())


def test_norms_and_scaled_copies_of_many_tensors() -> None:
    """|(3, 4)| = 5 and |12| = 12 make 13."""
    flag = torch.zeros(1, dtype=torch.int32).cuda()
    tensors = [torch.tensor([3.0, 4.0]).cuda(), torch.tensor([[12.0]]).cuda().bfloat16()]
    total, each = multi_tensor_applier(multi_tensor_l2norm, flag, [tensors], True)
    assert total.tolist() == [13.0] and each.tolist() == [5.0, 12.0]
    copies = [torch.empty(2).cuda(), torch.empty(1, 1).cuda()]
    multi_tensor_applier(multi_tensor_scale, flag, [tensors, copies], 0.5)
    assert [copy.tolist() for copy in copies] == [[1.5, 2.0], [[6.0]]] and flag.item() == 0
    tensors[0][1] = torch.inf
    multi_tensor_applier(multi_tensor_scale, flag, [tensors, copies], 0.5)
    assert flag.item() == 1


def test_experts_rows_are_padded_with_zeros_and_unpadded() -> None:
    """Transformer Engine's modules: 3, 0 and 17 rows become 16, 0 and 32, and gradients return."""
    rows, sizes = normal(20, 8).requires_grad_(), [3, 0, 17]
    padded, padded_sizes = te.Fp8Padding(3, align_size=16)(rows, sizes)
    assert padded_sizes == [16, 0, 32]
    wanted = torch.zeros(48, 8, dtype=torch.bfloat16)
    wanted[:3], wanted[16:33] = rows.detach().cpu()[:3], rows.detach().cpu()[3:]
    assert torch.equal(padded.detach().cpu(), wanted)
    back = te.Fp8Unpadding(3, align_size=16)(padded, sizes)
    assert torch.equal(back.detach().cpu(), rows.detach().cpu())
    grad = normal(20, 8, seed=1)
    back.backward(grad)
    assert torch.equal(rows.grad.cpu(), grad.cpu())
