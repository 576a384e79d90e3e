"""The module that is found under the name `transformer_engine_torch`, and what else an import of its package wants."""

import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any

import torch

from tests.cudaless.device import CUDA, CudaTensor
from tests.cudaless.engine import (
    attention,
    constants,
    context_parallel,
    flex,
    gemm,
    normalization,
    optimizer,
    quantize,
    rope,
)

KERNELS = (
    attention.fused_attn_bwd,
    attention.fused_attn_fwd,
    attention.get_fused_attn_backend,
    context_parallel.thd_grad_correction,
    context_parallel.thd_out_correction,
    context_parallel.thd_read_half_tensor,
    context_parallel.thd_read_second_half_lse,
    context_parallel.thd_second_half_lse_correction,
    gemm.generic_gemm,
    gemm.get_num_cublas_streams,
    gemm.te_general_grouped_gemm,
    normalization.rmsnorm_bwd,
    normalization.rmsnorm_fwd,
    optimizer.fused_multi_row_padding,
    optimizer.fused_multi_row_unpadding,
    optimizer.multi_tensor_adam,
    optimizer.multi_tensor_l2norm,
    optimizer.multi_tensor_scale,
    quantize.bgrad_quantize,
    quantize.dequantize,
    quantize.fp8_transpose,
    quantize.fused_amax_and_scale_update_after_reduction,
    quantize.quantize,
    quantize.split_quantize,
    rope.fused_rope_backward,
    rope.fused_rope_forward,
)
VERSIONS = {"get_cublasLt_version": 130000, "get_cudnn_version": 91300}
"""Of CUDA 13.0: what pytorch/quantization.py and pytorch/utils.py (2.11.0) ask before they choose a path."""

_NAMED_AT_IMPORT = ["layernorm_fwd", "layernorm_bwd", "rmsnorm_bwd_add"]
"""pytorch/module/_common.py (2.11.0) takes them from a star import, which asks no `__getattr__`."""
_WITHOUT = [
    "transformer_engine.pytorch.onnx_extensions",
    "transformer_engine.pytorch.triton",
    "transformer_engine.pytorch.triton.cross_entropy",
    "transformer_engine.pytorch.triton.pad",
    "transformer_engine.pytorch.triton.permutation",
]
"""They want packages that no path of this project needs."""


class Absent(types.ModuleType):
    """A module whose every name can be imported and called by nobody."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refused(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} is not emulated")

        return refused


def extension() -> types.ModuleType:
    """Make the module -> what `import transformer_engine_torch` finds."""
    module = Absent("transformer_engine_torch")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    for name in _NAMED_AT_IMPORT:
        setattr(module, name, getattr(module, name))
    for function in KERNELS:
        setattr(module, function.__name__, function)
    for name, value in vars(constants).items():
        if isinstance(value, type):
            setattr(module, name, value)
    for name, version in VERSIONS.items():
        setattr(module, name, lambda version=version: version)
    return module


def install() -> None:
    """Let `import transformer_engine` find this extension, and FlexAttention its predicate; once a process."""
    if "transformer_engine_torch" in sys.modules:
        return
    # transformer_engine/common/__init__.py (2.11.0) loads no library then; Inductor and Triton have no GPU to write for
    os.environ.update(NVTE_PROJECT_BUILDING="1", NVTE_TORCH_COMPILE="0", TORCHDYNAMO_DISABLE="1")
    sys.modules["transformer_engine_torch"] = extension()
    for name in [*_WITHOUT, *(["einops"] if importlib.util.find_spec("einops") is None else [])]:
        sys.modules[name] = Absent(name)
        sys.modules[name].__path__ = []  # type: ignore[attr-defined]
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    _let_tensors_be_known()
    import torch.nn.attention.flex_attention as torch_flex

    torch_flex.flex_attention = flex.flex_attention


def _let_tensors_be_known() -> None:
    """To Transformer Engine a GPU tensor is a `torch.Tensor`, and a quantised one lies on the GPU."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    QuantizedTensor.device = property(lambda self: CUDA)
    QuantizedTensor.is_cuda = property(lambda self: True)
    plain = utils.AttentionParams.__init__

    def with_plain_type(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("qkv_type") is CudaTensor:  # get_attention_backend (2.11.0) compares types by identity
            kwargs["qkv_type"] = torch.Tensor
        plain(self, *args, **kwargs)

    utils.AttentionParams.__init__ = with_plain_type
