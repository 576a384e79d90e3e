"""What all kernels have in common: they are counted, take GPU tensors alone, and autograd does not see into them."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.cudaless.device import CudaTensor, host_of, in_kernel, is_foreign, mapped, on_gpu

CALLS: Counter[str] = Counter()
"""Calls by the extension's name of the kernel; products of FP8 operands also under the name with " fp8" behind it."""


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function on host memory take GPU tensors, as an entry of the extension does.

    Raises:
        RuntimeError: a tensor of the CPU, whose address means nothing to a GPU.
    """

    @functools.wraps(function)
    def launched(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        given: dict[int, Tensor] = {}  # by the id of what shares its memory

        def on_host(tensor: Tensor) -> Tensor:
            if isinstance(tensor, CudaTensor):
                host = host_of(tensor)
                given[id(host)] = tensor
                return host
            if not is_foreign(tensor) and tensor.numel():
                raise RuntimeError(
                    f"{function.__name__}: a CPU tensor {tuple(tensor.shape)} of {tensor.dtype} among its arguments: "
                    "CUDA error: an illegal memory access was encountered"
                )
            return tensor

        args, kwargs = mapped(on_host, (args, kwargs))
        with in_kernel():
            result = function(*args, **kwargs)
        return mapped(lambda tensor: given[id(tensor)] if id(tensor) in given else on_gpu(tensor), result)

    return launched


def spans(bounds: Tensor) -> list[tuple[int, int]]:
    """Pair the cumulative lengths of sequences -> (first, last + 1) of each."""
    return list(itertools.pairwise(bounds.tolist()))


def concatenated(ranges: list[tuple[int, int]]) -> Tensor:
    """List the numbers of several ranges, one after the other -> [total] int64."""
    return torch.cat([torch.arange(first, last) for first, last in ranges])


def require_int32(**lengths: Tensor | None) -> None:
    """Kernels read cumulative lengths as int32, whatever they hold.

    Raises:
        RuntimeError: another type.
    """
    for name, tensor in lengths.items():
        if tensor is not None and tensor.dtype != torch.int32:
            raise RuntimeError(f"{name} is {tensor.dtype}, and the kernel reads int32")
