"""Products of matrices as cuBLASLt forms them on a Hopper: in bfloat16, float16, float32 and FP8, alone and in groups.

Transformer Engine states them for column-major memory. In rows, with op() the transposition that `transa`, `transb` ask
for, D = op(B) @ op(A). Hopper's FP8 kernels know one form, both operands with the summed index K last; so here every
operand is first brought to [rows, K], FP8 by the copy that has that form. What is refused is what
common/gemm/cublaslt_gemm.cu (2.11.0) checks, pytorch/utils.py assert_dim_for_fp8_exec, and cuBLASLt's table of types.
"""

from typing import Any

import torch
from torch import Tensor

from tests.cudaless.device import host_of
from tests.cudaless.engine.constants import TORCH_DTYPE, DType
from tests.cudaless.engine.kernel import CALLS, kernel
from tests.cudaless.engine.quantize import BLOCK, decode


def _kind(operand: Any) -> str:
    if isinstance(operand, Tensor) and not hasattr(operand, "_fp8_dtype"):
        return str(operand.dtype)
    return "blockwise FP8" if hasattr(operand, "_rowwise_scale_inv") else "FP8"


def _summed_last(operand: Any, is_last: bool) -> Tensor:
    """Widen an operand -> [rows, K] float32.

    Args:
        is_last: whether the product sums over the operand's last dimension, or over all others.

    Raises:
        RuntimeError: an FP8 operand without the copy that has K last, or of sides that Hopper's kernels do not take.
    """
    kind, which = _kind(operand), "row-wise" if is_last else "column-wise"
    if not kind.endswith("FP8"):
        matrix = operand.reshape(-1, operand.shape[-1])
        return (matrix if is_last else matrix.T).float()
    if kind == "FP8":
        scale, codes = operand._scale_inv, operand._data if is_last else operand._transpose
        codes = None if not is_last and operand._transpose_invalid else codes
    elif is_last:
        codes, scale = operand._rowwise_data, operand._rowwise_scale_inv
    else:
        codes, scale = operand._columnwise_data, operand._columnwise_scale_inv
    if codes is None:
        raise RuntimeError(f"GEMM: {kind} operand without the {which} copy that a Hopper reads")
    codes, scale = host_of(codes), host_of(scale)
    matrix = codes.reshape(-1, codes.shape[-1]) if is_last else codes.reshape(codes.shape[0], -1)
    if matrix.shape[0] % 8 or matrix.shape[1] % 16:
        raise RuntimeError(
            f"GEMM: FP8 operand of {matrix.shape[0]} x {matrix.shape[1]} (K): cuBLAS takes K in multiples of 16, "
            "the other side in multiples of 8"
        )
    wide = decode(matrix, operand._fp8_dtype)
    return wide * scale if kind == "FP8" else wide * _spread(scale, wide.shape, operand._is_2D_scaled)


def _spread(scale: Tensor, shape: torch.Size, square: bool) -> Tensor:
    """Give each value its block's scale, laid out as by `Float8BlockQuantizer.get_scale_shape` -> [rows, K]."""
    blocks = scale.repeat_interleave(BLOCK, 0)[: shape[0]] if square else scale.T[: shape[0]]
    return blocks.repeat_interleave(BLOCK, 1)[:, : shape[1]]


def _product(A: Any, transa: bool, B: Any, transb: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Multiply -> (op(B) @ op(A) [M, N] float32, op(B) [M, K]).

    Raises:
        RuntimeError: types that cuBLASLt has no product of, or other sides.
    """
    kinds = _kind(A), _kind(B)
    if kinds[0] != kinds[1]:
        raise RuntimeError(f"GEMM: cuBLAS has no product of {kinds[0]} and {kinds[1]}")
    if kinds[0].endswith("FP8"):
        if A._fp8_dtype == B._fp8_dtype == DType.kFloat8E5M2:
            raise RuntimeError("GEMM: cuBLAS has no product of E5M2 and E5M2")
    elif dtype not in (A.dtype, torch.float32):
        raise RuntimeError(f"GEMM: cuBLAS has no product of {A.dtype} that is {dtype}")
    if kinds[0] == "blockwise FP8" and A._is_2D_scaled and B._is_2D_scaled:
        raise RuntimeError("GEMM: cuBLAS has no product of 128x128 blocks with 128x128 blocks")
    left, right = _summed_last(B, not transb), _summed_last(A, transa)
    if left.shape[1] != right.shape[1]:
        raise RuntimeError(f"GEMM: sums over {left.shape[1]} and {right.shape[1]} values")
    return left @ right.T, left


@kernel
def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: DType | None,
    bias: Tensor | None,
    bias_type: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Multiply -> (D, gradient of the bias, None, None); D has B's leading dimensions where B is not transposed.

    Caller: pytorch/cpp_extensions/gemm.py general_gemm (2.11.0).

    Args:
        D: where to write; a new tensor of `output_dtype`, if None.
        bias: added to each row; with `grad`, what stands for "sum op(B) over K", as a bias's gradient is.
        accumulate: add to D.
    """
    assert comm_overlap is None and quantizer is None and not gelu, "no path of this project asks for it"
    if _kind(A).endswith("FP8"):
        CALLS["generic_gemm fp8"] += 1
    assert D is not None or output_dtype is not None
    dtype = TORCH_DTYPE[output_dtype] if D is None else D.dtype
    product, left = _product(A, transa, B, transb, dtype)
    product, bias_grad = product * alpha, None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = left.sum(1).to(bias.dtype)
        else:
            product += bias.float()
    if D is None:
        assert not accumulate
        shape = product.shape if transb else (*B.size()[:-1], product.shape[1])
        return product.to(dtype).reshape(shape), bias_grad, None, None
    _write(D, product, accumulate)
    return D, bias_grad, None, None


def _write(target: Tensor, product: Tensor, accumulate: bool) -> None:
    product = product.view(target.shape)
    target.copy_(product + target.float() if accumulate else product)


@kernel
def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    D: list[Tensor],
    D_type: DType,
    m_splits: list[int] | None,
    bias: list[Tensor],
    bias_type: DType,
    single_output: bool,
    pre_gelu_out: list[Tensor],
    grad: bool,
    workspace: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """Multiply for each expert -> the biases, or with `grad` their gradients, which are written.

    Caller: pytorch/cpp_extensions/gemm.py general_grouped_gemm (2.11.0). An expert without tokens has a product of
    zeros, and adds nothing.

    Args:
        D: one tensor an expert, or with `single_output` one whose rows are all experts'.
        m_splits: tokens of each expert.
    """
    if _kind(A[0]).endswith("FP8"):
        CALLS["te_general_grouped_gemm fp8"] += 1
    if single_output:
        assert m_splits is not None
        flat = D[0].view(-1, D[0].shape[-1])
        if sum(m_splits) != len(flat):
            raise RuntimeError(f"grouped GEMM: {sum(m_splits)} tokens of experts into {len(flat)} rows")
        D = list(flat.split(m_splits))
    for index, (a, b, target) in enumerate(zip(A, B, D, strict=True)):
        if b.size()[0] == 0:
            if not accumulate:
                target.zero_()
            if grad:
                bias[index].zero_()
            continue
        product, left = _product(a, transa, b, transb, target.dtype)
        if bias[index].numel():
            if grad:
                bias[index].copy_(left.sum(1))
            else:
                product += bias[index].float()
        _write(target, product, accumulate)
    return bias


def get_num_cublas_streams() -> int:
    """Streams, hence workspaces, of grouped products.

    Caller: pytorch/cpp_extensions/gemm.py get_cublas_workspace (2.11.0).
    """
    return 4
