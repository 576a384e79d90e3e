"""RMSNorm as Transformer Engine's kernels compute it: in float32, rounded once."""

from typing import Any

import torch
from torch import Tensor

from tests.cudaless.engine.constants import TORCH_DTYPE, DType
from tests.cudaless.engine.kernel import kernel
from tests.cudaless.engine.quantize import quantized


def _factor(weight: Tensor, zero_centered_gamma: bool) -> Tensor:
    return weight.float() + 1 if zero_centered_gamma else weight.float()


@kernel
def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:
    """Divide each row by its root mean square -> (rows, quantised if there is a quantiser; None; 1 / rms [rows]).

    Caller: pytorch/module/_common.py apply_normalization (2.11.0). Under delayed scaling one kernel casts to FP8; under
    the other recipes rows are rounded to `otype` first (pytorch/csrc/extensions/normalization.cpp).

    Raises:
        RuntimeError: input that is not a matrix of the weight's type.
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    if input.dim() != 2 or input.dtype != weight.dtype:
        raise RuntimeError(f"rmsnorm of {tuple(input.shape)} {input.dtype} with a weight of {weight.dtype}")
    wide = input.float()
    rsigma = torch.rsqrt(wide.square().mean(1) + eps)
    wide, dtype = wide * rsigma[:, None] * _factor(weight, zero_centered_gamma), TORCH_DTYPE[otype]
    if quantizer is not None:
        rows = wide if isinstance(quantizer, Float8Quantizer) else wide.to(dtype)
        return quantized(rows, quantizer, ln_out, dtype=dtype), None, rsigma
    return wide.to(dtype) if ln_out is None else ln_out.copy_(wide), None, rsigma


@kernel
def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Differentiate RMSNorm -> (gradient of x, of gamma).

    Caller: pytorch/module/layernorm_linear.py _LayerNormLinear.backward (2.11.0).
    """
    grad, normal = dz.float().reshape(x.shape), x.float() * rsigma[:, None]
    weighted = grad * _factor(gamma, zero_centered_gamma)
    dx = rsigma[:, None] * (weighted - normal * (weighted * normal).mean(1, keepdim=True))
    return dx.to(x.dtype), (grad * normal).sum(0).to(gamma.dtype)
