"""A CUDA device that is not there: tensors that say `cuda:0`, lie in host memory and refuse what CUDA refuses.

`install()` wraps every tensor that is made for "cuda" in `CudaTensor` and lets `torch.cuda` answer as one H100
(runtime.py). Operators run on the CPU's kernels. To C++ a `CudaTensor` is a CPU tensor with the same storage, so
autograd, views and in-place operators are torch's own; in Python it lies on cuda:0. Rules kept, with their owners in
torch 2.13 (2.11 and 2.9 have the same):

- operands on one device, CPU numbers (0-d) apart: ATen/TensorIterator.cpp `compute_types`; `checkAllSameGPU` of the
  kernels that take no number either; indices: ATen/native/cuda/Indexing.cu, native/TensorAdvancedIndexing.cpp.
- what makes the host wait is noted in `LOG`: the places where ATen/native/cuda says `memcpy_and_sync` or
  `warn_or_error_on_sync` (torch.cuda.set_sync_debug_mode reports these); CUDA's memory API, "API synchronization
  behavior", for copies of pageable memory.
- what a copy to the host without a wait brings is garbage until something waits.

Not emulated: time, streams' order, the limits of kernels but those named here.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class HostWait(NamedTuple):
    """One time that the host had to wait for the GPU."""

    what: str
    shape: tuple[int, ...]
    caller: str
    """File, line and function of the first frame outside torch and the emulation."""


LOG: list[HostWait] = []
"""Every wait so far, of this process."""


class CudaTensor(Tensor):
    """Shares storage with a CPU tensor and says cuda:0."""

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> "CudaTensor":
        return Tensor._make_subclass(cls, host, requires_grad)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to(CPU)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self) -> Any:
        waits("tolist", self)
        return host_of(self).tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = made = CudaTensor(host_of(self).clone(), self.requires_grad)
            made.__dict__.update(self.__dict__)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return CudaTensor, (host_of(self).detach().clone(), self.requires_grad)

    def __repr__(self, **_: Any) -> str:
        return f"cuda({host_of(self)!r})"


class in_kernel:
    """Within the block a CudaTensor is the CPU tensor that it shares storage with, and autograd sees nothing."""

    def __enter__(self) -> None:
        self._guards = torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd()

    def __exit__(self, *_: object) -> None:
        del self._guards


def host_of(tensor: Tensor) -> Tensor:
    """Find the CPU tensor behind a GPU one -> same storage, sizes and strides."""
    if not isinstance(tensor, CudaTensor):
        return tensor
    with in_kernel():
        return aten.alias.default(tensor)


def on_gpu(host: Any) -> Any:
    """Let a plain CPU tensor say cuda:0 -> CudaTensor; all else as it is."""
    return CudaTensor(host) if type(host) is Tensor else host


def waits(what: str, tensor: Tensor | None = None) -> None:
    """Note that the host waits for all that the GPU was given; copies under way have arrived then."""
    LOG.append(HostWait(what, () if tensor is None else tuple(tensor.shape), _caller()))
    arrive()


_OWN = tuple(__file__.replace("device.py", part) for part in ("device.py", "runtime.py", "engine/"))


def _caller() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and not path.startswith(_OWN):
            return f"{path.split('site-packages/')[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


# ---- Copies between the devices --------------------------------------------------------------------------------------

_under_way: list[tuple[Tensor, Tensor]] = []
"""Copies to the host that nobody has waited for: (where the values will be, the values)."""


def arrive() -> None:
    """Let the copies under way reach the host."""
    while _under_way:
        target, values = _under_way.pop(0)
        with torch.no_grad(), in_kernel():
            target.copy_(values)


def under_way() -> bool:
    """Tell whether copies to the host have yet to arrive."""
    return bool(_under_way)


def is_pinned(tensor: Tensor) -> bool:
    """Tell whether the tensor lies in pinned host memory."""
    return not isinstance(tensor, CudaTensor) and getattr(tensor.untyped_storage(), "is_pinned_by_cudaless", False)


def pinned(tensor: Tensor) -> Tensor:
    """Mark host memory as pinned -> the same tensor."""
    tensor.untyped_storage().is_pinned_by_cudaless = True  # type: ignore[attr-defined]
    return tensor


class Transfer(torch.autograd.Function):
    """A copy between the devices, back again in backward. Autograd's own formula knows the devices of C++ only."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, non_blocking: bool) -> Tensor:
        return _transferred(source, non_blocking)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _transferred(grad, False), None


def _transferred(source: Tensor, non_blocking: bool) -> Tensor:
    """Copy to the other device. To the GPU a copy does not wait if the source is pinned; to the host, into memory that
    torch pins itself (ATen/native/TensorConversions.cpp, `pin_out`), if it need not."""
    with torch.no_grad():
        if not isinstance(source, CudaTensor):
            if not (non_blocking and is_pinned(source)):
                waits("copy of pageable memory to the GPU", source)
            return on_gpu(source.detach().clone())
        values = host_of(source).detach().clone()
        if not non_blocking:
            waits("copy to the CPU", source)
            return values
        return _garbage_until_waited_for(pinned(torch.empty_like(values)), values)


def _garbage_until_waited_for(target: Tensor, values: Tensor) -> Tensor:
    with in_kernel():
        target.fill_(torch.nan if values.is_floating_point() else -123 if values.dtype.is_signed else 1)
    _under_way.append((target, values))
    return target


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    """`target.copy_(source)`, whose two sides may lie on two devices."""
    if isinstance(target, CudaTensor):
        if not isinstance(source, CudaTensor) and not (non_blocking and is_pinned(source)):
            waits("copy of pageable memory to the GPU", source)
    elif non_blocking and is_pinned(target):
        values = torch.empty_like(target)
        values.copy_(host_of(source))
        _garbage_until_waited_for(target, values)
        return
    else:
        waits("copy to the CPU", source)
    with in_kernel():
        aten.copy_.default(host_of(target), host_of(source))


# ---- Operators -------------------------------------------------------------------------------------------------------

_METADATA = {"resize_", "set_", "t_", "transpose_", "unsqueeze_", "squeeze_", "swapaxes_", "swapdims_", "as_strided_",
             "resize_as_"}  # fmt: skip
"""They change the sizes or the storage of their first argument."""

_WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique_consecutive",
    aten.unique_dim.default: "unique_dim",
}
"""They answer on the host, or their result's shape follows from the data."""

_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_TAKES_ANY = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor, aten.is_same_size.default,
              aten._has_compatible_shallow_copy_type.default}  # fmt: skip
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
_TAKES_NO_NUMBER = {*_PRODUCTS, "cat", "stack", "embedding", "gather", "scatter", "scatter_",
                    "scatter_add", "scatter_add_", "index_select", "index_add", "index_add_", "index_copy_",
                    "repeat_interleave"}  # fmt: skip


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operator by CUDA's rules -> its result; NotImplemented where another tensor class has its own way."""
    given = list(_tensors((args, kwargs)))
    if any(is_foreign(tensor) for tensor in given):
        return NotImplemented
    name = func._schema.name.partition("::")[2]
    gpu = any(isinstance(tensor, CudaTensor) for tensor in given)
    if name in ("is_pinned", "_pin_memory", "pin_memory"):
        return _pinning(name, given[0])
    kwargs, to_gpu = _destination(name, args, kwargs, gpu)
    if func.namespace == "c10d":
        check_collective(func, args, given)
    elif gpu:
        check_devices(func, name, args, given)
        check_types(name, given)
        if func is aten.copy_.default and not all(isinstance(tensor, CudaTensor) for tensor in given):
            _copy(*args, **kwargs)
            return args[0]
        _note_wait(func, name, args, kwargs, given[0])
    if name in _METADATA and isinstance(args[0], CudaTensor):
        with in_kernel():
            func(*args, **kwargs)
        return args[0]
    wrapped: dict[int, tuple[Tensor, Tensor]] = {}  # the host tensor is kept, lest another take its id

    def unwrap(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, CudaTensor):
            return tensor
        host = host_of(tensor)
        wrapped[id(host)] = host, tensor
        return host

    host_args, host_kwargs = mapped(unwrap, (args, kwargs))
    with in_kernel():
        result = KERNELS.get(func, func)(*host_args, **host_kwargs)
    if not to_gpu and not wrapped:
        return result

    def wrap(tensor: Tensor) -> Tensor:
        if id(tensor) in wrapped:
            return wrapped[id(tensor)][1]
        return on_gpu(tensor) if to_gpu else tensor

    return mapped(wrap, result)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Find the tensors among an operator's arguments, in their order (torch.utils._pytree takes ten times as long)."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def mapped(function: Callable[[Tensor], Any], values: Any) -> Any:
    """Put what a function makes of each tensor in its place, in tuples, lists and dictionaries of arguments."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, (tuple, list)):
        return type(values)([mapped(function, value) for value in values])
    if isinstance(values, dict):
        return {name: mapped(function, value) for name, value in values.items()}
    return values


def is_foreign(tensor: Tensor) -> bool:
    """Tell tensors of other classes, such as Transformer Engine's quantised ones, which dispatch for themselves."""
    return type(tensor) not in (Tensor, torch.nn.Parameter, CudaTensor)


def _pinning(name: str, tensor: Tensor) -> Any:
    """ATen/native/Memory.cpp: only dense CPU tensors can be pinned, into memory of their own."""
    if name == "is_pinned":
        return is_pinned(tensor)
    if isinstance(tensor, CudaTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    with in_kernel():
        return tensor if is_pinned(tensor) else pinned(tensor.clone())


def _destination(name: str, args: Any, kwargs: dict[str, Any], gpu: bool) -> tuple[dict[str, Any], bool]:
    """Say where the result lies -> (keyword arguments as the CPU's kernel takes them, whether on the GPU)."""
    device = kwargs.get("device")
    to_gpu = gpu if device is None else torch.device(device).type == "cuda"
    if gpu and isinstance(args[0], CudaTensor) and (name == "_to_copy" or name.startswith("new_") or "_like" in name):
        to_gpu = True  # autograd's formulas name the device of C++; who means the CPU in Python is heard in runtime.py
    if device is not None and to_gpu:
        kwargs = {**kwargs, "device": CPU}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    return kwargs, to_gpu


def check_devices(func: Any, name: str, args: Any, given: list[Tensor]) -> None:
    """Refuse a CPU tensor beside a GPU one, but for the numbers and the indices that CUDA takes."""
    if func in _TAKES_ANY:
        return
    checked = given
    if name in _INDEXED:
        if not isinstance(args[0], CudaTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        checked = [args[0], *args[2:3]]
    written = args[0] if name.endswith("_") else None
    for tensor in checked:
        if not isinstance(tensor, Tensor) or isinstance(tensor, CudaTensor):
            continue
        if tensor.numel() == 0:
            continue  # autograd's formulas make empty ones, on the CPU here, for parts that no gradient reached
        if tensor.dim() > 0 or tensor is written or name in _TAKES_NO_NUMBER:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func}, a CPU tensor of {tuple(tensor.shape)})"
            )


NCCL_GROUPS: set[str] = set()
"""Names of the process groups that know NCCL alone; runtime.py keeps it."""


def check_collective(func: Any, args: Any, given: list[Tensor]) -> None:
    """Refuse a CPU tensor over NCCL: torch/csrc/distributed/c10d/ProcessGroup.hpp, `getBackend`.

    A barrier carries a CPU tensor of its own here, as there is no NCCL. Gloo takes tensors of both devices.
    """
    names = [argument.name for argument in func._schema.arguments]
    if "barrier" in func._schema.name or "process_group" not in names:
        return
    group = torch.distributed.ProcessGroup.unbox(args[names.index("process_group")])
    if group.group_name in NCCL_GROUPS and not all(isinstance(tensor, CudaTensor) for tensor in given):
        raise RuntimeError(f"No backend type associated with device type cpu ({func})")


def check_types(name: str, given: list[Tensor]) -> None:
    """Refuse what CPU kernels take and CUDA's do not: cuBLAS multiplies no integers (ATen/native/cuda/Blas.cpp)."""
    if name in _PRODUCTS and not given[-1].is_floating_point() and not given[-1].is_complex():
        raise RuntimeError(f'"addmm_cuda" not implemented for {given[-1].dtype}')


def _note_wait(func: Any, name: str, args: Any, kwargs: dict[str, Any], tensor: Tensor) -> None:
    if func in _WAITING:
        waits(_WAITING[func], tensor)
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        waits("repeat_interleave without output_size", tensor)
    elif name in _INDEXED:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            waits("index by a mask", tensor)
        elif any(not isinstance(index, CudaTensor) for index in indices):
            waits("index by a CPU tensor", tensor)


def _addmm_wide(
    total: Tensor, left: Tensor, right: Tensor, dtype: Any, *, beta: Any = 1, alpha: Any = 1, out: Any
) -> Any:
    """addmm with float32 sums of bfloat16 factors (ATen/native/cuda/Blas.cpp, `_addmm_dtype_cuda`, torch 2.11)."""
    if left.dtype != right.dtype:
        raise RuntimeError("mat1 and mat2 must have the same dtype")
    narrow = left.dtype in (torch.bfloat16, torch.float16)
    if dtype != out.dtype or (dtype != left.dtype and not (dtype == torch.float32 and narrow)):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    if total.dtype not in (dtype, left.dtype):
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")
    return out.copy_(beta * total.to(dtype) + alpha * (left.to(dtype) @ right.to(dtype)))


def _product_wide(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.to(dtype) @ right.to(dtype)


def _with_float32_sums(product: Any) -> Callable[..., Any]:
    """Multiply bfloat16 by its float32 values and round once, as cuBLAS does.

    A CPU without instructions for bfloat16 takes ten times as long for its own kernel.
    """

    def multiplied(*tensors: Tensor, **factors: Any) -> Tensor:
        if tensors[0].dtype != torch.bfloat16:
            return product(*tensors, **factors)
        return product(*(tensor.float() for tensor in tensors), **factors).to(torch.bfloat16)

    return multiplied


KERNELS: dict[Any, Callable[..., Any]] = {
    operator.default: _with_float32_sums(operator.default) for operator in (getattr(aten, name) for name in _PRODUCTS)
} | {
    getattr(getattr(aten, name), overload): kernel
    for name, overload, kernel in (
        ("addmm", "dtype_out", _addmm_wide),
        ("mm", "dtype", _product_wide),
        ("bmm", "dtype", _product_wide),
    )
    if hasattr(getattr(aten, name), overload)  # since torch 2.11
}
"""In place of the CPU's: of its own there is none, or a slow one."""


class EmulatedCuda(TorchDispatchMode):
    """Sees what has no GPU tensor among its arguments: factories and transfers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = run(func, args, kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


# ---- Turning it on ---------------------------------------------------------------------------------------------------

_mode: EmulatedCuda | None = None


def install() -> None:
    """Make `torch.cuda` answer, and take every operator of this process through the emulation. Idempotent."""
    global _mode
    if _mode is not None:
        return
    from tests.cudaless import runtime  # it builds on this file

    torch.autograd.set_multithreading_enabled(False)  # the mode belongs to this thread
    runtime.answer_for_cuda()
    _mode = EmulatedCuda()
    _mode.__enter__()
    threading.Thread.run = _emulated(threading.Thread.run)  # type: ignore[method-assign]


def _emulated(run_thread: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Let a thread begin with a mode of its own: a GPU is a process's, a mode a thread's."""

    @functools.wraps(run_thread)
    def run_in_mode(thread: threading.Thread) -> None:
        with EmulatedCuda() if torch.cuda.is_available() else contextlib.nullcontext():
            run_thread(thread)

    return run_in_mode


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Within the block there is no GPU: for the truths that tests compute on the CPU."""
    assert _mode is not None
    available: Any = torch.cuda.is_available
    _mode.__exit__(None, None, None)
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = available
        _mode.__enter__()
