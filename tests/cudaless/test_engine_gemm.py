"""Products of the emulated extension, called as Transformer Engine calls them, against float64 and its own reference.

What it does not show: the order of cuBLAS's sums, TF32, speed.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.common.recipe import CustomRecipe, Float8BlockScaling, Float8CurrentScaling
from transformer_engine.pytorch.cpp_extensions.gemm import general_gemm, general_grouped_gemm
from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import current_scaling_ref_quantizer_factory
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

from tests.cudaless.engine import CALLS
from tests.cudaless.engine.constants import DType

E4M3, E5M2 = DType.kFloat8E4M3, DType.kFloat8E5M2
TOKENS, INPUTS, OUTPUTS = 48, 160, 272


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Weight, input and gradient of a linear layer."""
    return normal(OUTPUTS, INPUTS), normal(TOKENS, INPUTS, seed=1), normal(TOKENS, OUTPUTS, seed=2)


def products(weight: Any, input: Any, grad: Any) -> dict[str, tuple[Any, Any]]:
    """The three products of a linear layer -> layout: (A, B)."""
    return {"TN": (weight, input), "NN": (weight, grad), "NT": (input, grad)}


def exact(weight: Tensor, input: Tensor, grad: Tensor) -> dict[str, Tensor]:
    weight, input, grad = (tensor.cpu().double() for tensor in (weight, input, grad))
    return {"TN": input @ weight.T, "NN": grad @ weight, "NT": grad.T @ input}


def assert_near(found: Tensor, wanted: Tensor, step: float) -> None:
    """Within a relative step of rounding, and what sums of float32 lose (values are up to about 50)."""
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=step, atol=1e-4)


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 1e-6)])
def test_wide_products_are_rounded_once(layout: str, dtype: torch.dtype, step: float) -> None:
    given = [tensor.to(dtype) for tensor in operands()]
    a, b = products(*given)[layout]
    found, *_ = general_gemm(a, b, out_dtype=dtype, layout=layout)
    assert found.dtype == dtype
    assert_near(found, exact(*given)[layout], step)


def test_biases_are_added_and_differentiated_and_gradients_accumulated() -> None:
    weight, input, grad = operands()
    bias, main_grad = normal(OUTPUTS, seed=3), normal(OUTPUTS, INPUTS, dtype=torch.float32, seed=4)
    three = input.view(TOKENS // 3, 3, INPUTS)
    found, *_ = general_gemm(weight, three, out_dtype=torch.bfloat16, bias=bias)
    assert found.shape == (TOKENS // 3, 3, OUTPUTS)
    wanted = exact(weight, input, grad)
    assert_near(found.view(TOKENS, OUTPUTS), wanted["TN"] + bias.cpu().double(), 2**-8)
    before = main_grad.cpu().double()
    found, bias_grad, *_ = general_gemm(
        input, grad, layout="NT", out=main_grad, accumulate=True, bias=bias, grad=True, out_dtype=torch.float32
    )
    assert found is main_grad
    assert_near(main_grad, before + wanted["NT"], 1e-6)
    assert_near(bias_grad, grad.cpu().double().sum(0), 2**-8)


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def per_tensor(dtype: DType, **usage: bool) -> Float8CurrentScalingQuantizer:
    return Float8CurrentScalingQuantizer(dtype, torch.device("cuda"), **usage)


def blockwise(dtype: DType, dim: int = 1, **usage: bool) -> Float8BlockQuantizer:
    return Float8BlockQuantizer(dtype, **{"rowwise": True, "columnwise": True, **usage}, block_scaling_dim=dim)


def as_read(quantizer: Any, tensor: Tensor, *, columnwise: bool) -> Tensor:
    """Transformer Engine's own reading of the copy that a product takes -> float64, in the tensor's shape."""
    if isinstance(quantizer, Float8BlockQuantizer):
        quantizer.set_usage(rowwise=not columnwise, columnwise=columnwise)
    result = quantizer(tensor).dequantize(dtype=torch.float32).cpu().double()
    quantizer.set_usage(rowwise=True, columnwise=True)
    return result


RECIPES: dict[str, Callable[[], tuple[Any, Any, Any]]] = {  # quantisers of weight, input, gradient
    "tensorwise": lambda: (per_tensor(E4M3), per_tensor(E4M3), per_tensor(E5M2)),
    "blockwise": lambda: (blockwise(E4M3, 2), blockwise(E4M3), blockwise(E4M3)),
}


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_products_are_those_of_the_copies_with_the_summed_side_last(recipe: str, layout: str) -> None:
    quantizers, given = RECIPES[recipe](), operands()
    quantised = [quantizer(tensor) for quantizer, tensor in zip(quantizers, given, strict=True)]
    a, b = products(*quantised)[layout]
    CALLS.clear()
    found, *_ = general_gemm(a, b, out_dtype=torch.float32, layout=layout)
    assert CALLS == {"generic_gemm": 1, "generic_gemm fp8": 1}
    columnwise = {"TN": (False, False, False), "NN": (True, True, False), "NT": (True, True, True)}[layout]
    read = [as_read(q, t, columnwise=c) for q, t, c in zip(quantizers, given, columnwise, strict=True)]
    assert_near(found, exact(*read)[layout], 1e-5)
    assert float((found.cpu().double() - exact(*given)[layout]).abs().max()) > 0.1  # FP8 was on


@pytest.mark.parametrize("layer_class", [te.Linear, te.LayerNormLinear])
def test_a_layer_in_fp8_is_transformer_engine_s_python_reference(layer_class: Callable[..., Any]) -> None:
    """Its reference recipe quantises in Python and multiplies by torch._scaled_mm; forward, and all gradients."""
    results = []
    settings = {"normalization": "RMSNorm"} if layer_class is te.LayerNormLinear else {}
    for recipe in (CustomRecipe(qfactory=current_scaling_ref_quantizer_factory), Float8CurrentScaling()):
        layer = layer_class(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, **settings)
        weight, input, grad = operands()
        layer.weight.data.copy_(weight)
        input.requires_grad_()
        with te.autocast(enabled=True, recipe=recipe):
            output = layer(input)
        output.backward(grad)
        results.append((output, input.grad, *(parameter.grad for parameter in layer.parameters())))
    for wanted, found in zip(*results, strict=True):
        assert_near(found.detach(), wanted.detach().cpu().double(), 2**-7)


def test_a_linear_layer_in_blocks_is_near_float64() -> None:
    """E4M3 is off by up to 2^-4 a value, evenly spread about 2^-4 / sqrt(3) / 2, twice: some 0.026 of the norm."""
    layer, (weight, input, grad) = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16), (
        normal(384, 256), normal(128, 256, seed=1), normal(128, 384, seed=2),
    )  # fmt: skip
    layer.weight.data.copy_(weight)
    input.requires_grad_()
    with te.autocast(enabled=True, recipe=Float8BlockScaling()):
        output = layer(input)
    output.backward(grad)
    wanted = exact(weight, input.detach(), grad)
    for found, layout in ((output, "TN"), (input.grad, "NN"), (layer.weight.grad, "NT")):
        error = found.detach().cpu().double() - wanted[layout]
        assert 0.01 < float(error.norm() / wanted[layout].norm()) < 0.045


def refused() -> dict[str, tuple[str, Callable[[], Any]]]:
    fp8, other = per_tensor(E4M3), per_tensor(E5M2)
    weight, input, grad = operands()
    rows = per_tensor(E4M3, rowwise=True, columnwise=False)
    columns = per_tensor(E4M3, rowwise=False, columnwise=True)
    block_rows = blockwise(E4M3, columnwise=False)
    square = blockwise(E4M3, 2)

    def multiply(a: Any, b: Any, layout: str = "TN", out_dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
        return lambda: general_gemm(a, b, out_dtype=out_dtype, layout=layout)

    return {
        "K of 152": ("multiples of 16", multiply(fp8(weight[:, :152]), fp8(input[:, :152]))),
        "4 tokens": ("multiples of 8", multiply(fp8(weight), fp8(input[:4]))),
        "40 tokens, summed": ("multiples of 16", multiply(fp8(input[:40]), fp8(grad[:40]), "NT")),
        "no transpose": ("column-wise", multiply(rows(weight), fp8(grad), "NN")),
        "no rows": ("row-wise", multiply(columns(weight), fp8(input))),
        "no blocks by column": ("column-wise", multiply(block_rows(input), blockwise(E4M3)(grad), "NT")),
        "FP8 and bfloat16": ("no product of FP8", multiply(fp8(weight), input)),
        "squares with squares": ("128x128", multiply(square(weight), square(input))),
        "E5M2 twice": ("E5M2", multiply(other(weight), other(input))),
        "float32 and bfloat16": ("float32", multiply(weight.float(), input)),
        "float32 into bfloat16": ("that is", multiply(weight.float(), input.float())),
        "sums of other lengths": ("sums over", multiply(weight, grad)),
        "a tensor of the CPU": ("illegal memory", multiply(weight, input.cpu())),
    }


@pytest.mark.parametrize("case", refused())
def test_what_cublas_refuses_is_refused(case: str) -> None:
    message, call = refused()[case]
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- Groups ----------------------------------------------------------------------------------------------------------

SPLITS = [16, 0, 32]


@pytest.mark.parametrize("fp8", [False, True])
def test_experts_products_are_those_of_each_alone(fp8: bool) -> None:
    """Forward into one tensor, the input's gradient alike, the weights' gradients into one each, added."""
    weights = [normal(OUTPUTS, INPUTS, seed=seed) for seed in range(3)]
    _, input, grad = operands()
    inputs, grads = input.split(SPLITS), grad.split(SPLITS)
    if fp8:
        weights, inputs = ([per_tensor(E4M3)(each) for each in group] for group in (weights, inputs))
        grads = [per_tensor(E5M2)(each) for each in grads]
    bias = [normal(OUTPUTS, seed=9)] * 3
    forward, backward = (torch.full((TOKENS, n), torch.nan, dtype=torch.bfloat16).cuda() for n in (OUTPUTS, INPUTS))
    main = [torch.ones(OUTPUTS, INPUTS).cuda() for _ in range(3)]
    settings = {"quantization_params": [None] * 3, "out_dtype": torch.bfloat16, "m_splits": SPLITS}
    general_grouped_gemm(weights, inputs, [forward], single_output=True, bias=bias, use_bias=True, **settings)
    general_grouped_gemm(weights, grads, [backward], layout="NN", single_output=True, grad=True, **settings)
    _, bias_grads, _ = general_grouped_gemm(
        inputs, grads, main, layout="NT", grad=True, accumulate=True, bias=bias, use_bias=not fp8, **settings
    )
    alone = {"layout": "TN", "out_dtype": torch.bfloat16}
    edges = [0, *itertools.accumulate(SPLITS)]
    for index, (first, last) in enumerate(itertools.pairwise(edges)):
        if first == last:
            assert torch.equal(main[index].cpu(), torch.ones(OUTPUTS, INPUTS))
            continue
        one = weights[index], inputs[index], grads[index]
        assert torch.equal(forward[first:last].cpu(), general_gemm(one[0], one[1], bias=bias[0], **alone)[0].cpu())
        wanted = general_gemm(one[0], one[2], **{**alone, "layout": "NN"})[0]
        assert torch.equal(backward[first:last].cpu(), wanted.cpu())
        wanted = general_gemm(one[1], one[2], layout="NT", out_dtype=torch.float32)[0]
        torch.testing.assert_close(main[index].cpu(), wanted.cpu() + 1, rtol=0, atol=0)
        if not fp8:
            assert_near(bias_grads[index], one[2].cpu().double().sum(0), 2**-8)


def test_experts_tokens_must_fill_the_output() -> None:
    weight, input, _ = operands()
    with pytest.raises(RuntimeError, match="48 tokens of experts into 64 rows"):
        general_grouped_gemm(
            [weight] * 3, input.split(SPLITS), [torch.empty(64, OUTPUTS, dtype=torch.bfloat16).cuda()],
            [None] * 3, torch.bfloat16, m_splits=SPLITS, single_output=True,
        )  # fmt: skip
