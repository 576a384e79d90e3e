"""Megatron-Core on CPU ranks over gloo: the only place that replaces parts of Megatron-Core, and only without CUDA.

Megatron-Core (0.16.1, 0.19.2) asks for "cuda" by name in a few modules. Each replacement below says where. With a GPU
`install` does nothing.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

_MODULES_THAT_NAME_CUDA = (
    "megatron.core.pipeline_parallel.schedules",  # the running token count
    "megatron.core.optimizer.optimizer",  # found_inf, the loss scale
    "megatron.core.optimizer.clip_grads",  # gradient norm, zero count
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.models.common.embeddings.rope_utils",  # context parallelism: pinned memory, .cuda()
    "megatron.core.transformer.utils",  # the default causal mask
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.utils",  # the multi-tensor L2 norm
    "megatron.core.dist_checkpointing.exchange_utils",  # room for what another rank has read
)
_FACTORIES = frozenset({"tensor", "zeros", "ones", "empty", "empty_like", "arange", "full"})


class _TorchOnCpu:
    """Stands for the name `torch` inside one module of mcore: tensors asked for on "cuda" are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch, name)
        if name not in _FACTORIES:
            return attribute

        def factory(*arguments: Any, **settings: Any) -> torch.Tensor:
            if str(settings.get("device", "")).startswith("cuda"):
                settings["device"] = "cpu"
            settings.pop("pin_memory", None)
            return attribute(*arguments, **settings)

        return factory


class _NoStream:
    """A CUDA stream where there is none: everything is in order already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


def install() -> None:
    """Let Megatron-Core run on the CPU. Idempotent; does nothing where CUDA is available."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_megatron_sppo_cpu", False):
        return
    cuda: Any = torch.cuda
    cuda._megatron_sppo_cpu = True
    _replace_device_queries()
    _replace_random_state()
    for name in _MODULES_THAT_NAME_CUDA:
        with contextlib.suppress(ModuleNotFoundError):
            module: Any = importlib.import_module(name)
            module.torch = _TorchOnCpu()
    _route_without_transformer_engine()
    _load_checkpoints_into_memory()
    _call_cpu_tensors_cuda_inside_the_optimizer()


def _replace_device_queries() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.current_stream = lambda *_, **__: _NoStream()
    cuda.Stream = _NoStream
    cuda.stream = lambda *_: contextlib.nullcontext()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self


def _replace_random_state() -> None:
    """Activation recomputation and the RNG tracker save and restore the CUDA generator (tensor_parallel/random.py)."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _route_without_transformer_engine() -> None:
    """The router asks whether `te_general_gemm` is None; 0.16.1 leaves the name undefined without the engine."""
    moe: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe, "te_general_gemm"):
        moe.te_general_gemm = None


def _load_checkpoints_into_memory() -> None:
    """A parallel load makes room on "cuda" for what other ranks read (dist_checkpointing/mapping.py)."""
    sharded: Any = importlib.import_module("megatron.core.dist_checkpointing.mapping").ShardedTensor
    original: Callable[..., None] = sharded.init_data
    sharded.init_data = lambda self, _device, *arguments, **settings: original(self, "cpu", *arguments, **settings)


def _call_cpu_tensors_cuda_inside_the_optimizer() -> None:
    """The optimizer sorts parameters by `Tensor.type()` and knows the torch.cuda.* types only."""
    tensor: Any = torch.Tensor
    original: Callable[..., Any] = tensor.type

    def type_(self: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        answer = original(self, *arguments, **settings)
        asks = not arguments and not settings and isinstance(answer, str) and not answer.startswith("torch.cuda.")
        if asks and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor.type = type_
