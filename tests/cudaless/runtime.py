"""What `torch.cuda`, the factories and `torch.distributed` say where there is one H100.

Owners of the contracts: torch/cuda/__init__.py, streams.py, random.py, memory.py; torch/_tensor.py; NCCL's stand-in
keeps what torch/distributed/distributed_c10d.py and torch/csrc/distributed/c10d/ProcessGroup.hpp say of backends.
"""

import contextlib
import functools
import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
import torch.utils._device
from torch import Tensor

from tests.cudaless.device import CPU, CUDA, NCCL_GROUPS, CudaTensor, Transfer, host_of, is_foreign, under_way, waits

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
    uuid="GPU-0",
    is_integrated=False,
    pci_bus_id=0,
)
"""As cudaDeviceProp has it; 232448 bytes are the 227 KiB of compute capability 9.0."""

_TYPES = {
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Double": torch.float64,
    "Int": torch.int32,
    "Long": torch.int64,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "frombuffer", "full", "full_like",
              "linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm",
              "tensor", "zeros", "zeros_like")  # fmt: skip
_METHODS = ["new_empty", "new_full", "new_ones", "new_zeros"]


class Stream:
    """A stream whose work is always done."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        waits("Stream.synchronize")

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """An event that has happened once no copy is under way."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        waits("Event.synchronize")

    def query(self) -> bool:
        return not under_way()

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def answer_for_cuda() -> None:
    """Put all of this file's answers in place, once a process."""
    _answer_queries()
    _extend_tensor()
    _extend_factories()
    _stand_in_for_nccl()


def _answer_queries() -> None:
    cuda: Any = torch.cuda
    generator = torch.default_generator

    def always(value: Any) -> Any:
        return lambda *_, **__: value

    random = {  # functions of our own: torch._dynamo.trace_rules refuses one object under two names
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: generator.manual_seed(seed),
        "manual_seed_all": lambda seed: generator.manual_seed(seed),
        "initial_seed": lambda: generator.initial_seed(),
    }
    constants = {
        "_lazy_init": None,
        "init": None,
        "is_initialized": True,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_capability": (H100.major, H100.minor),
        "get_device_properties": H100,
        "get_device_name": H100.name,
        "get_arch_list": ["sm_90"],
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "stream": contextlib.nullcontext(),
        "device": contextlib.nullcontext(),
        "graph_pool_handle": 0,
        "ipc_collect": None,
        "empty_cache": None,
        "memory_allocated": 1 << 30,
        "max_memory_allocated": 1 << 30,
        "memory_reserved": 1 << 30,
        "max_memory_reserved": 1 << 30,
        "reset_peak_memory_stats": None,
        "memory_stats": {"num_alloc_retries": 0, "allocated_bytes.all.peak": 1, "reserved_bytes.all.peak": 1},
        "mem_get_info": (70 << 30, 80 << 30),
    }
    for name, value in constants.items():
        setattr(cuda, name, always(value))
    for name, answer in random.items():
        setattr(cuda, name, answer)
        setattr(cuda.random, name, answer)
    cuda.default_generators = (generator,)
    cuda.synchronize = lambda *_, **__: waits("torch.cuda.synchronize")
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *_, **__: Stream()
    if torch.accelerator.current_accelerator() is not None:  # a build for CUDA: its optimisers ask here
        torch.accelerator.current_stream = cuda.current_stream
    cuda.nccl.version = always((2, 27, 5))
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = always(None)
    torch._C._cuda_getDevice = always(0)  # type: ignore[attr-defined]
    torch.version.cuda = "13.0"
    torch.backends.cudnn.version = always(91300)  # type: ignore[assignment]
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-Core asks for it under TP on a Hopper


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def _indexed(value: Any) -> Any:
    """A bare number and "cuda" mean the current device."""
    if isinstance(value, int) and not isinstance(value, bool):
        return CUDA
    return CUDA if isinstance(value, str | torch.device) and str(value) == "cuda" else value


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(_indexed(device)).type == "cuda"


def _extend_tensor() -> None:
    tensor: Any = Tensor
    plain_to, plain_type, plain_data = tensor.to, tensor.type, torch._C.TensorBase.data

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to`, with the devices that Python sees: to C++ a GPU tensor lies on the CPU."""
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        args = (*(_indexed(value) if i == 0 else value for i, value in enumerate(args)),)
        kwargs = {name: _indexed(value) if name == "device" else value for name, value in kwargs.items()}
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        same = device is None or (device.type == "cuda") == (self.device.type == "cuda")
        settings: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if memory_format is not None:
            settings["memory_format"] = memory_format
        if is_foreign(self):
            return plain_to(self, copy=copy, **settings, **({} if device is None else {"device": device}))
        if same:
            return plain_to(self, copy=copy, **settings) if settings or copy else self
        moved = Transfer.apply(self, non_blocking)
        return plain_to(moved, **settings) if settings else moved

    def type_(self: Tensor, *arguments: Any, **settings: Any) -> Any:
        answer = plain_type(self, *arguments, **settings)
        if isinstance(answer, str) and isinstance(self, CudaTensor) and not answer.startswith("torch.cuda"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    def set_data(self: Tensor, value: Tensor) -> None:
        """`Module.to` and `Module.cuda` give a parameter a new place by its `data`; it stays the same object."""
        plain_data.__set__(self, value)
        if isinstance(value, CudaTensor) != isinstance(self, CudaTensor) and not is_foreign(self):
            parameter = isinstance(self, torch.nn.Parameter)
            home = torch.nn.Parameter if parameter else Tensor
            self.__class__ = CudaTensor if isinstance(value, CudaTensor) else home
            self._is_param = parameter  # type: ignore[attr-defined]

    tensor.to = to
    tensor.cuda = lambda self, device=None, non_blocking=False, **_: self.to(CUDA, non_blocking=non_blocking)
    tensor.type = type_
    tensor.data = property(lambda self: plain_data.__get__(self), set_data)
    tensor.get_device = lambda self: 0 if isinstance(self, CudaTensor) else -1
    tensor.record_stream = lambda *_: None
    for name in _METHODS:
        setattr(tensor, name, _method(getattr(tensor, name)))
    tensor.new_tensor = lambda self, values, dtype=None, device=None, **kwargs: torch.tensor(
        values, dtype=dtype or self.dtype, device=device or self.device, **kwargs
    )
    for name, dtype in _TYPES.items():
        setattr(torch.cuda, f"{name}Tensor", _TensorType(f"{name}Tensor", (), {"dtype": dtype}))


class _TensorType(type):
    """torch.cuda.FloatTensor and its kin, which are called and asked for (mcore 0.19.2, transformer/module.py)."""

    dtype: torch.dtype

    def __call__(cls, *values: Any) -> Tensor:
        if len(values) == 1 and isinstance(values[0], list | tuple):
            return torch.tensor(values[0], dtype=cls.dtype, device=CUDA)
        return torch.empty(*values, dtype=cls.dtype, device=CUDA)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, CudaTensor) and value.dtype == cls.dtype


def _method(plain: Any) -> Any:
    """`new_zeros` and its kin where a device is named."""

    @functools.wraps(plain)
    def made(self: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or _is_cuda(device) == isinstance(self, CudaTensor):
            return plain(self, *args, **kwargs)
        return plain(self, *args, **kwargs, device=CUDA) if _is_cuda(device) else plain(host_of(self), *args, **kwargs)

    return made


# ---- Factories -------------------------------------------------------------------------------------------------------


class _Devices(type):
    """`torch.device`, which takes a bare number for a GPU's where there is one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type(CPU))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return CUDA if args and isinstance(args[0], int) else type(CPU)(*args, **kwargs)


class _Device(metaclass=_Devices): ...


def _extend_factories() -> None:
    torch.utils._device._device_constructors()  # a cached list of the factories as they were
    torch.jit._state.disable()  # scripts know the factories as they were
    torch.device = _Device  # type: ignore[misc, assignment]
    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    plain: Any = Tensor._make_wrapper_subclass

    def make_wrapper_subclass(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Quantised tensors lie on the CPU for C++, like all here; `engine` lets them say cuda:0."""
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return plain(cls, *args, **kwargs)

    Tensor._make_wrapper_subclass = staticmethod(make_wrapper_subclass)  # type: ignore[method-assign]


def _factory(plain: Any) -> Any:
    name = plain.__name__

    @functools.wraps(plain)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        pin = kwargs.pop("pin_memory", False)
        device = kwargs.get("device")
        if _is_cuda(device):
            kwargs["device"] = CUDA
            if name in ("tensor", "as_tensor"):  # their values lie on the host first
                del kwargs["device"]
                requires_grad = kwargs.pop("requires_grad", False)
                return plain(*args, **kwargs).to(CUDA).requires_grad_(requires_grad)
        elif device is not None and "_like" in name:
            args = (host_of(args[0]), *args[1:])
        elif name == "as_tensor" and device is not None and isinstance(args[0], Tensor):
            args = (args[0].to(device), *args[1:])
        result = plain(*args, **kwargs)
        return result.pin_memory() if pin else result

    return made


# ---- NCCL ------------------------------------------------------------------------------------------------------------


class Request:
    """A message under way that can be waited for again, as NCCL's can: gloo's own second wait wants a second message.

    Transformer Engine's context_parallel.py (2.11.0) waits twice in backward.
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *args: Any) -> bool:
        work, self._work = self._work, None
        return work is None or work.wait(*args)

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()


def _stand_in_for_nccl() -> None:
    """gloo carries what is meant for NCCL; `device.check_collective` knows which groups those are."""
    plain_init, plain_group, plain_backend, plain_device = (
        c10d.init_process_group, c10d.new_group, c10d.get_backend, c10d._get_object_coll_device
    )  # fmt: skip

    def started(plain: Any, backend: Any, **kwargs: Any) -> Any:
        """Start a group; one that knows NCCL alone has no place for CPU tensors."""
        kwargs = {name: value for name, value in kwargs.items() if name not in ("pg_options", "device_id")}
        group = plain(**kwargs, backend="gloo" if backend else None) or c10d._get_default_group()
        if isinstance(group, c10d.ProcessGroup):  # not where this rank is no member
            (NCCL_GROUPS.add if backend == "nccl" else NCCL_GROUPS.discard)(group.group_name)
        return group

    @functools.wraps(plain_init)
    def init_process_group(backend: Any = None, init_method: Any = None, **kwargs: Any) -> None:
        started(plain_init, backend, init_method=init_method, **kwargs)

    @functools.wraps(plain_group)
    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **kwargs: Any) -> Any:
        return started(plain_group, backend or get_backend(), ranks=ranks, timeout=timeout, **kwargs)

    def on_nccl(group: Any) -> bool:
        return (group or c10d._get_default_group()).group_name in NCCL_GROUPS

    @functools.wraps(plain_backend)
    def get_backend(group: Any = None) -> Any:
        return "nccl" if on_nccl(group) else plain_backend(group)

    def object_device(group: Any = None) -> str:
        """Pickled objects travel where the group can carry them."""
        return "cuda" if on_nccl(group) else plain_device(group)

    def awaited_again(plain: Any) -> Any:
        @functools.wraps(plain)
        def started(*args: Any, **kwargs: Any) -> Any:
            work = plain(*args, **kwargs)
            return work if work is None else Request(work)

        return started

    def one_by_one(operations: Any) -> list[Any]:
        """NCCL sends a batch as one; gloo has no such thing and would lose track of what to wait for."""
        return [each.op(each.tensor, each.peer, each.group, each.tag) for each in operations]

    plain_coalescing = c10d._coalescing_manager

    def coalesced(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        """NCCL takes its calls together for a device; gloo takes the list of them, as where no device is named."""
        return plain_coalescing(group, None, async_ops)

    answers = {
        "init_process_group": init_process_group,
        "new_group": new_group,
        "get_backend": get_backend,
        "batch_isend_irecv": one_by_one,
        "isend": awaited_again(c10d.isend),
        "irecv": awaited_again(c10d.irecv),
        "_coalescing_manager": coalesced,
    }
    c10d._get_object_coll_device = object_device
    for name, answer in answers.items():
        setattr(torch.distributed, name, answer)
        setattr(c10d, name, answer)
