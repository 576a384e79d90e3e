"""FP8 as Hopper's cast kernels make it: one scale a tensor (delayed or current), or one for 1x128 or 128x128 values.

M = rows (all dimensions but the last), K = the last one. A quantised tensor holds codes row by row, [.., K], and column
by column, [K, ..]: Hopper's products read the one or the other. Blockwise the two are rounded apart, by other blocks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.cudaless.device import host_of, on_gpu
from tests.cudaless.engine.constants import TORCH_DTYPE, DType, Float8BlockScaleTensorFormat
from tests.cudaless.engine.kernel import kernel

LARGEST = {DType.kFloat8E4M3: 448.0, DType.kFloat8E5M2: 57344.0}
BLOCK = 128


# ---- Rounding --------------------------------------------------------------------------------------------------------


def encode(values: Tensor, dtype: DType) -> Tensor:
    """Round float32 to the nearest FP8 value, ties to even, saturating like PTX's cvt.rn.satfinite -> uint8 codes."""
    return values.clamp(-LARGEST[dtype], LARGEST[dtype]).to(TORCH_DTYPE[dtype]).view(torch.uint8)


def decode(codes: Tensor, dtype: DType) -> Tensor:
    """Read FP8 codes -> float32."""
    return codes.view(TORCH_DTYPE[dtype]).float()


def scale_of(amax: Tensor, *, dtype: DType, epsilon: float, power_of_two: bool, ceiling: float) -> Tensor:
    """Choose the factor that brings the largest magnitude to FP8's, as `_scale_from_amax_tensor` does, float32.

    pytorch/custom_recipes/quantization_current_scaling.py (2.11.0); the kernels by common/recipe/recipe_common.cuh,
    which is 1 where amax is 0 or not finite.

    Args:
        ceiling: in place of a factor that float32 cannot hold.
    """
    amax = amax.clamp_min(epsilon)
    scale = torch.div(LARGEST[dtype], amax)  # `number / tensor` would multiply by a rounded reciprocal
    scale = torch.where(torch.isinf(scale), ceiling, scale)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where((amax == 0) | ~torch.isfinite(amax), 1.0, scale)


# ---- One scale a tensor ----------------------------------------------------------------------------------------------


def _set_current_scale(wide: Tensor, quantizer: Any) -> None:
    if not quantizer.use_existing_amax:
        quantizer.amax.fill_(wide.abs().max() if wide.numel() else 0)
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(
            quantizer.amax, op=torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
        )
    scale = scale_of(
        host_of(quantizer.amax),
        dtype=quantizer.dtype,
        epsilon=quantizer.amax_epsilon,
        power_of_two=quantizer.force_pow_2_scales,
        ceiling=torch.finfo(torch.float32).max,
    )
    quantizer.scale.copy_(scale)


def _note_amax(wide: Tensor, quantizer: Any) -> None:
    if wide.numel():
        quantizer.amax.copy_(torch.maximum(host_of(quantizer.amax), wide.abs().max()))


def _per_tensor(wide: Tensor, quantizer: Any) -> dict[str, Any]:
    scale = host_of(quantizer.scale).reshape(1)
    codes = encode(wide * scale, quantizer.dtype)
    return {
        "data": codes if quantizer.rowwise_usage else None,
        "data_transpose": transposed(codes) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": scale.reciprocal(),
        "fp8_dtype": quantizer.dtype,
    }


def transposed(codes: Tensor) -> Tensor:
    """Bring the last dimension to the front: [.., K] -> [K, ..]."""
    return codes.movedim(-1, 0).contiguous()


# ---- One scale a block -----------------------------------------------------------------------------------------------


def _in_blocks(matrix_MK: Tensor, quantizer: Any, ceiling: float) -> tuple[Tensor, Tensor]:
    """Round a matrix by blocks along its last dimension -> codes [M, K], 1 / scales [M / height, K / 128]."""
    rows, columns = matrix_MK.shape
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    padded = pad(matrix_MK, (0, -columns % BLOCK, 0, -rows % height))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))
    scale = scale_of(
        blocks.abs().amax((1, 3)),
        dtype=quantizer.dtype,
        epsilon=quantizer.amax_epsilon,
        power_of_two=quantizer.force_pow_2_scales,
        ceiling=ceiling,
    )
    codes = encode(blocks * scale[:, None, :, None], quantizer.dtype)
    return codes.reshape(padded.shape)[:rows, :columns].contiguous(), scale.reciprocal()


def _blockwise(wide: Tensor, quantizer: Any, ceiling: float) -> dict[str, Any]:
    """Lay codes and scales out as `Float8BlockQuantizer.make_empty` does: ready for a product, or to be gathered."""
    flat = wide.reshape(-1, wide.shape[-1])
    square, compact = quantizer.block_scaling_dim == 2, quantizer.all_gather_usage
    layout = Float8BlockScaleTensorFormat.COMPACT if compact else Float8BlockScaleTensorFormat.GEMM_READY
    fields = {"fp8_dtype": quantizer.dtype, "is_2D_scaled": square, "data_format": layout}
    for columnwise, prefix in ((False, "rowwise"), (True, "columnwise")):
        fields[f"{prefix}_data"] = fields[f"{prefix}_scale_inv"] = None
        if not (quantizer.columnwise_usage if columnwise else quantizer.rowwise_usage):
            continue
        codes, inverse = _in_blocks(flat.T if columnwise else flat, quantizer, ceiling)
        if not square and (columnwise or not compact):
            inverse = inverse.T
        if columnwise and compact and not square:
            codes = codes.T.contiguous()
        width = quantizer.get_scale_shape(wide.shape, columnwise=columnwise)[1]
        shape = quantizer.get_columnwise_shape(wide.shape) if columnwise else wide.shape
        fields[f"{prefix}_data"] = codes.view(tuple(shape))
        fields[f"{prefix}_scale_inv"] = pad(inverse, (0, width - inverse.shape[1])).contiguous()
    return fields


# ---- The extension's entries -----------------------------------------------------------------------------------------


def quantized(source: Tensor, quantizer: Any, output: Any = None, *, dtype: torch.dtype | None = None) -> Any:
    """Quantise host memory -> a quantised tensor on the GPU, or `output`, refilled.

    Args:
        dtype: what the result calls itself; the source's, if None.
    """
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor
    from transformer_engine.pytorch.tensor.storage import float8_blockwise_tensor_storage, float8_tensor_storage

    wide, dtype = source.float(), dtype or source.dtype
    classes: tuple[type, type] = float8_tensor.Float8Tensor, float8_tensor_storage.Float8TensorStorage
    if isinstance(quantizer, float8_tensor.Float8CurrentScalingQuantizer):
        _set_current_scale(wide, quantizer)
        fields = _per_tensor(wide, quantizer)
    elif isinstance(quantizer, float8_tensor.Float8Quantizer):
        fields = _per_tensor(wide, quantizer)
        _note_amax(wide, quantizer)
    elif isinstance(quantizer, float8_blockwise_tensor.Float8BlockQuantizer):
        fields = _blockwise(wide, quantizer, torch.finfo(source.dtype).max)
        classes = (
            float8_blockwise_tensor.Float8BlockwiseQTensor,
            float8_blockwise_tensor_storage.Float8BlockwiseQTensorStorage,
        )
    else:
        raise NotImplementedError(f"Hopper has no {type(quantizer).__name__}")
    if output is not None:
        _refill(output, fields)
        return output
    fields = {name: on_gpu(value) for name, value in fields.items()}
    if quantizer.internal:
        return classes[1](**fields, quantizer=quantizer)
    return classes[0](shape=source.shape, dtype=dtype, **fields, quantizer=quantizer)


def _refill(output: Any, fields: dict[str, Any]) -> None:
    """Write new codes and scales; a copy that is not asked for is dropped, one that is missing made.

    csrc/quantizer.cpp `convert_and_update_tensor` (2.11.0) coerces both: a copy left as it was would be stale.
    """
    names = {"data_transpose": "_transpose", "fp8_scale_inv": "_scale_inv"}
    for name, value in fields.items():
        attribute = names.get(name, f"_{name}")
        target = getattr(output, attribute)
        if isinstance(value, Tensor) and target is not None:
            target.copy_(value.view(target.shape))
        elif isinstance(value, Tensor) or value is None:
            setattr(output, attribute, on_gpu(value))
    if "data_transpose" in fields:
        output._transpose_invalid = fields["data_transpose"] is None


@kernel
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Cast to FP8 -> a quantised tensor with the copies that the quantiser asks for.

    Caller: pytorch/tensor/float8_tensor.py Float8Quantizer.quantize_impl, update_quantized (2.11.0).

    Args:
        noop: where it holds 1, `output` stays as it is.
    """
    if noop is not None and noop.item() == 1:
        return output
    return quantized(tensor.contiguous(), quantizer, output)


@kernel
def split_quantize(tensor: Tensor, split_sections: list[int], quantizers: list[Any]) -> list[Any]:
    """Cast the rows of each expert by its own quantiser -> one quantised tensor an expert.

    Caller: pytorch/module/grouped_linear.py _GroupedLinear.forward, backward (2.11.0).
    """
    parts = tensor.split(split_sections)
    return [quantized(part.contiguous(), quantizer) for part, quantizer in zip(parts, quantizers, strict=True)]


@kernel
def bgrad_quantize(grad_output: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Sum a gradient over its rows and cast it -> (gradient of the bias [K], quantised gradient).

    Caller: pytorch/module/base.py TransformerEngineBaseModule.grad_output_preprocess (2.11.0).
    """
    total = grad_output.float().reshape(-1, grad_output.shape[-1]).sum(0)
    return total.to(grad_output.dtype), quantized(grad_output.contiguous(), quantizer)


@kernel
def dequantize(tensor: Any, dtype: DType) -> Tensor:
    """Widen a tensor of one scale.

    Caller: pytorch/tensor/storage/float8_tensor_storage.py _FromFloat8Func.forward (2.11.0).
    """
    return (decode(host_of(tensor._data), tensor._fp8_dtype) * host_of(tensor._scale_inv)).to(TORCH_DTYPE[dtype])


@kernel
def fp8_transpose(data: Tensor, dtype: DType, *, out: Tensor | None = None) -> Tensor:
    """Copy codes column by column: [.., K] -> [K, ..].

    Caller: pytorch/tensor/storage/float8_tensor_storage.py Float8TensorStorage._create_transpose (2.11.0).
    """
    return transposed(data) if out is None else out.copy_(transposed(data).view(out.shape))


@kernel
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: list[Tensor],
    scales: list[Tensor],
    amax_compute_algo: str,
    fp8_dtype: DType,
    margin: float,
) -> None:
    """Delayed scaling: take the reduced amax into each history, choose the next scales by it and move on.

    Caller: pytorch/quantization.py FP8GlobalStateManager.reduce_and_update_fp8_tensors (2.11.0), whose
    `_amax_and_scale_update` says the same in Python.

    Args:
        amax_reduction_buffer: the newest amax of all tensors, in the histories' order.
        amax_histories: [length, tensors] of each module.
        scales: [tensors] of each module.
    """
    newest = amax_reduction_buffer.split([history.shape[1] for history in amax_histories])
    for history, scale, latest in zip(amax_histories, scales, newest, strict=True):
        history[0] = latest
        amax = history.amax(0) if amax_compute_algo == "max" else latest
        wanted = torch.div(LARGEST[fp8_dtype] / 2**margin, amax).clamp_max(torch.finfo(torch.float32).max)
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), wanted, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0
