"""FP8 of the emulated extension: codes by enumeration, scales and copies by Transformer Engine's Python reference.

What it does not show: how Hopper's cast kernels treat NaN.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import (
    CurrentScalingQuantizerRef,
    _scale_from_amax_tensor,
)
from transformer_engine.pytorch.distributed import _post_process_fp8_blockwise_gather
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

from tests.cudaless.device import host_of
from tests.cudaless.engine.constants import DType
from tests.cudaless.engine.quantize import (
    bgrad_quantize,
    decode,
    encode,
    fused_amax_and_scale_update_after_reduction,
    quantize,
    scale_of,
    split_quantize,
)

E4M3, E5M2 = DType.kFloat8E4M3, DType.kFloat8E5M2
TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
BITS = {E4M3: (4, 3, 7), E5M2: (5, 2, 15)}  # of exponent and mantissa, bias: arXiv:2209.05433, table 1


def value_of(code: int, dtype: DType) -> float:
    """What the paper's table says of finite codes; E4M3 has one NaN a sign and no infinity, E5M2 is as IEEE has it."""
    exponent_bits, mantissa_bits, bias = BITS[dtype]
    sign, exponent, mantissa = (
        code >> 7,
        (code >> mantissa_bits) & (2**exponent_bits - 1),
        code & (2**mantissa_bits - 1),
    )
    all_ones = exponent == 2**exponent_bits - 1
    if all_ones and (dtype == E5M2 or mantissa == 2**mantissa_bits - 1):
        return float("inf") if dtype == E5M2 and mantissa == 0 else float("nan")
    fraction = mantissa / 2**mantissa_bits
    size = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
    return -size if sign else size


def finite(dtype: DType) -> dict[int, float]:
    """Codes of numbers from 0 up, by size."""
    values = {code: value_of(code, dtype) for code in range(128)}
    return {code: value for code, value in values.items() if value < float("inf")}


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_all_256_codes_have_the_values_of_the_format(dtype: DType) -> None:
    found = decode(torch.arange(256, dtype=torch.uint8), dtype).abs()
    wanted = torch.tensor([value_of(code, dtype) for code in range(256)]).abs()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert max(finite(dtype).values()) == {E4M3: 448.0, E5M2: 57344.0}[dtype]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_values_go_to_the_nearest_code_and_ties_to_the_even_one(dtype: DType) -> None:
    """At, half-way between and just beside half-way between all neighbours, on both sides of 0."""
    values, codes = [], []
    for (low, a), (high, b) in itertools.pairwise(finite(dtype).items()):
        middle = (a + b) / 2
        beside = torch.tensor(middle)
        down, up = (float(torch.nextafter(beside, torch.tensor(side))) for side in (0.0, 1e9))
        values += [a, down, middle, up]
        codes += [low, low, low if low % 2 == 0 else high, high]
    found = encode(torch.tensor([values, [-value for value in values]]), dtype)
    assert found[0].tolist() == codes
    assert found[1].tolist() == [code + 128 for code in codes]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_too_large_becomes_the_largest(dtype: DType) -> None:
    largest = max(finite(dtype))
    found = encode(torch.tensor([449.0 * 2**8, 1e30, torch.inf, -torch.inf]), dtype)
    assert found.tolist() == [largest, largest, largest, largest + 128]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_are_those_of_the_reference(dtype: DType, power_of_two: bool) -> None:
    amax = torch.tensor([0.0, 1e-45, 1e-38, 1e-3, 0.4375, 1.0, 3.5, 448.0, 57344.0, 1e30])
    for epsilon, source in itertools.product([0.0, 0.01], [torch.bfloat16, torch.float32]):
        wanted, _, _ = _scale_from_amax_tensor(source, amax, TORCH[dtype], eps=epsilon, pow_2_scales=power_of_two)
        ceiling = torch.finfo(source).max
        found = scale_of(amax, dtype=dtype, epsilon=epsilon, power_of_two=power_of_two, ceiling=ceiling)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# ---- One scale a tensor ----------------------------------------------------------------------------------------------


def source_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values of sizes that differ from block to block by up to 2^8, on the GPU."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(*shape, generator=generator) * torch.exp2(torch.randint(-4, 5, shape, generator=generator))
    return values.to(dtype).cuda()


def current(dtype: DType = E4M3, **settings: Any) -> Float8CurrentScalingQuantizer:
    return Float8CurrentScalingQuantizer(dtype, torch.device("cuda"), **settings)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"force_pow_2_scales": True}, {"amax_epsilon": 1e3}], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_current_scaling_is_the_reference_s(dtype: DType, settings: dict[str, Any], source: torch.dtype) -> None:
    tensor = source_of(6, 5, 32, dtype=source)
    names = {"force_pow_2_scales": "pow_2_scales", "amax_epsilon": "eps"}
    reference = CurrentScalingQuantizerRef(TORCH[dtype], **{names[name]: value for name, value in settings.items()})
    wanted, found = reference.quantize(tensor.cpu()), current(dtype, **settings)(tensor)
    assert torch.equal(found._data.cpu().view(30, 32), wanted.data.view(torch.uint8))
    assert torch.equal(found._transpose.cpu().view(32, 30), wanted.data_t.view(torch.uint8))
    assert torch.equal(found._scale_inv.cpu(), wanted.scale)
    assert found.dequantize().dtype == source and found.device.type == "cuda"
    wide = reference.dequantize(wanted.data, wanted.scale, source).view(6, 5, 32)
    assert torch.equal(found.dequantize().cpu(), wide)


def delayed(scale: float, dtype: DType = E4M3) -> Float8Quantizer:
    return Float8Quantizer(torch.tensor([scale]).cuda(), torch.tensor([3.0]).cuda(), dtype)


def test_delayed_scaling_takes_its_scale_from_before_and_notes_the_largest_value() -> None:
    """1000 saturates at 448 / 2 under a scale of 2; amax keeps 3 until a larger value comes."""
    quantizer = delayed(2.0)
    found = quantizer(torch.tensor([[1.0, -1000.0, 2.5, 0.0]] * 2).cuda())
    assert found.dequantize().tolist() == [[1.0, -224.0, 2.5, 0.0]] * 2
    assert quantizer.amax.tolist() == [1000.0]
    quantizer(torch.ones(2, 4).cuda())
    assert quantizer.amax.tolist() == [1000.0]


@pytest.mark.parametrize("kind", ["current", "blockwise"])
def test_a_refilled_tensor_keeps_no_copy_that_was_not_asked_for(kind: str) -> None:
    """As a weight's cached codes are after a forward pass without gradients: their transpose would be of old values."""
    quantizer = current() if kind == "current" else Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True)
    tensor, name = source_of(128, 256), "_transpose" if kind == "current" else "_columnwise_data"
    target = quantizer(tensor)
    quantizer.set_usage(rowwise=True, columnwise=False)
    quantizer.update_quantized(tensor * 3, target)
    assert getattr(target, name) is None
    quantizer.set_usage(rowwise=True, columnwise=True)
    quantizer.update_quantized(tensor * 5, target)
    assert torch.equal(getattr(target, name), getattr(quantizer(tensor * 5), name))


def test_copies_are_made_as_asked_and_refilled_in_place() -> None:
    quantizer, tensor = current(), source_of(16, 32)
    quantizer.set_usage(rowwise=False, columnwise=True)
    assert quantizer(tensor)._data is None
    quantizer.set_usage(rowwise=True, columnwise=False)
    assert quantizer(tensor)._transpose is None
    quantizer.set_usage(rowwise=True, columnwise=True)
    target = quantizer(tensor)
    data, stop = target._data, torch.ones(1).cuda()
    quantizer.update_quantized(tensor * 3, target, noop_flag=stop)
    assert torch.equal(target.dequantize().cpu(), quantizer(tensor).dequantize().cpu())
    quantizer.update_quantized(tensor * 3, target, noop_flag=stop * 0)
    again = quantizer(tensor * 3)
    assert target._data is data
    for name in ("_data", "_transpose", "_scale_inv"):
        assert torch.equal(getattr(target, name).cpu(), getattr(again, name).cpu())


# ---- One scale a block -----------------------------------------------------------------------------------------------


def blocks(dim: int, **settings: Any) -> Float8BlockQuantizer:
    return Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True, block_scaling_dim=dim, **settings)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(128, 256), (2, 50, 144)], ids=str)
@pytest.mark.parametrize("height", [1, 128])
def test_each_block_is_quantised_as_a_tensor_of_its_own(
    height: int, shape: tuple[int, ...], power_of_two: bool
) -> None:
    """By Transformer Engine's reference of one scale a tensor; row by row and, transposed, column by column."""
    tensor = source_of(*shape)
    found = blocks(2 if height == 128 else 1, force_pow_2_scales=power_of_two)(tensor)
    reference = CurrentScalingQuantizerRef(TORCH[E4M3], pow_2_scales=power_of_two)
    flat = tensor.cpu().view(-1, shape[-1])
    for matrix, codes, scale in (
        (flat, found._rowwise_data, found._rowwise_scale_inv),
        (flat.T, found._columnwise_data, found._columnwise_scale_inv),
    ):
        codes, scale = codes.cpu().reshape(matrix.shape), scale.cpu() if height == 128 else scale.cpu().T
        for row, column in itertools.product(range(0, len(matrix), height), range(0, matrix.shape[1], 128)):
            here = slice(row, row + height), slice(column, column + 128)
            wanted = reference.quantize(matrix[here].contiguous())
            assert torch.equal(codes[here], wanted.data.view(torch.uint8))
            assert scale[row // height, column // 128] == wanted.scale


@pytest.mark.parametrize("dim", [1, 2])
def test_transformer_engine_reads_the_blocks_that_are_written(dim: int) -> None:
    """Its own `dequantize` gives the values back within half a step of E4M3, 2^-4, of each; or of its block's largest
    value: below 2^-6 / 448 of that, steps are 2^-9 / 448 wide (twice, as scales are powers of two)."""
    tensor = source_of(256, 384)
    for columnwise in (False, True):
        quantizer = blocks(dim)
        quantizer.set_usage(rowwise=not columnwise, columnwise=columnwise)
        error = (quantizer(tensor).dequantize().cpu().double() - tensor.cpu().double()).abs()
        assert (error <= tensor.cpu().double().abs() / 16 + float(tensor.abs().max()) * 2**-9 / 448).all()


def test_what_was_gathered_in_compact_form_is_what_a_product_reads() -> None:
    """Transformer Engine turns the compact form into the other; shape by shape and bit by bit they agree."""
    tensor = source_of(256, 384)
    quantizer = blocks(1, all_gather_usage=True)
    found = _post_process_fp8_blockwise_gather(quantizer(tensor), quantizer)
    wanted = blocks(1)(tensor)
    for name in ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv"):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name).cpu()), name


# ---- The rest --------------------------------------------------------------------------------------------------------


def test_experts_are_quantised_one_by_one() -> None:
    tensor, quantizers = source_of(48, 32), [current() for _ in range(3)]
    found = split_quantize(tensor, [16, 0, 32], quantizers)
    for part, mine, quantizer in zip(tensor.split([16, 0, 32]), found, quantizers, strict=True):
        wanted = quantize(part, quantizer)
        assert torch.equal(mine._data.cpu(), wanted._data.cpu()) and mine.shape == part.shape


def test_the_bias_s_gradient_is_the_sum_of_rows() -> None:
    grad = source_of(6, 5, 32)
    total, codes = bgrad_quantize(grad, current(E5M2))
    exact = grad.cpu().double().sum((0, 1))
    torch.testing.assert_close(total.cpu().double(), exact, rtol=2**-8, atol=1e-5)
    assert torch.equal(codes._data.cpu(), quantize(grad, current(E5M2))._data.cpu())


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_delayed_scales_follow_transformer_engine_s_python(algorithm: str) -> None:
    """Two modules, histories of four: a tensor that was 0 keeps its scale, so does one that was infinite. A step of
    float32 lies between: Python's `number / tensor` is a product with a reciprocal."""
    recipe = DelayedScaling(margin=1, amax_compute_algo=algorithm, amax_history_len=4)
    generator = torch.Generator().manual_seed(0)
    histories = [torch.rand(4, width, generator=generator) for width in (3, 2)]
    histories[0][:, 1] = 0
    latest = torch.tensor([2.0, 0.0, torch.inf, 1e-45, 7.0])
    scales = [torch.full((width,), 5.0) for width in (3, 2)]
    ours = [[tensor.clone().cuda() for tensor in group] for group in (histories, scales)]
    fused_amax_and_scale_update_after_reduction(latest.cuda(), *ours, algorithm, E4M3, recipe.margin)
    for history, scale, newest in zip(histories, scales, latest.split([3, 2]), strict=True):
        history[0] = newest
        quantization._amax_and_scale_update(history, scale, 448.0, recipe)
    for found, wanted in zip(itertools.chain(*ours), [*histories, *scales], strict=True):
        torch.testing.assert_close(host_of(found), wanted, rtol=2**-23, atol=0)


def test_what_a_hopper_has_not_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="MXFP8Quantizer"):
        quantize(source_of(32, 32), MXFP8Quantizer(E4M3))
