"""Process groups: which rank holds what. The only reader in training of `parallel_state`."""

import contextlib
import datetime
import functools
import itertools
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from megatron_sppo.command_line import check_rendezvous, launch
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.training import cpu
from megatron_sppo.training.config import ParallelConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BEAT_SECONDS = 5.0
_THREAD_TIMEOUT_SECONDS = 15.0
_uses = itertools.count()
"""Numbers what this process says by the launcher's store; every rank says the same things in the same order."""


def initialize(config: ParallelConfig, *, seed: int) -> None:
    """Start torch.distributed and all of Megatron-Core's process groups, and seed the model-parallel RNG.

    NCCL on CUDA, gloo on the CPU. A single process needs no launcher.
    """
    cpu.install()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launch().local_rank)
    if not torch.distributed.is_initialized():
        timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timeout,
            store=_new_store(timeout),
            rank=launch().rank,
            world_size=launch().world_size,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        create_gloo_process_groups=True,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True)


def told_by_rank_zero(config: ParallelConfig, find: Callable[[], T]) -> T:
    """Let rank 0 alone find something out, and tell the others -> the same on every rank. Collective.

    Needs no process group: it goes through the launcher's store. What is found is pickled. It may take rank 0 longer
    than the ranks' time-out, while it shows that it is at work.

    Raises:
        ConfigError, DataError, ConversionError, OSError: what rank 0 ran into, on every rank.
        ConfigError: as `check_rendezvous`.
    """
    check_rendezvous()
    place = launch()
    if place.world_size == 1:
        return find()
    store = _new_store(datetime.timedelta(minutes=config.distributed_timeout_minutes))
    fault: Exception | None = None
    if place.rank == 0:
        found: T | None = None
        try:
            with _beating(store):
                found = find()
        except (ConfigError, DataError, ConversionError, OSError) as error:
            fault = error
        store.set("found", pickle.dumps((found, fault)).hex())
        # This process may be the store, and may end before the others have heard.
        store.wait([f"heard by {rank}" for rank in range(1, place.world_size)])
    else:
        _wait_while_beating(store, "found", seconds=60 * config.distributed_timeout_minutes)
        found, fault = pickle.loads(bytes.fromhex(store.get("found").decode()))  # noqa: S301 rank 0's own words
        store.set(f"heard by {place.rank}", "")
    if fault is not None:
        raise fault
    return found  # type: ignore[return-value]


def made_by_rank_zero(config: ParallelConfig, make: Callable[[], T]) -> T | None:
    """Let rank 0 alone make something that stays there -> what it made, on other ranks None. Collective.

    As `told_by_rank_zero`, whose errors these are; what is made is not sent.
    """
    made: list[T] = []
    told_by_rank_zero(config, lambda: made.append(make()))
    return made[0] if made else None


@contextlib.contextmanager
def _beating(store: Store) -> Iterator[None]:
    """Count up in the store for as long as the block takes, so that whoever waits for its end sees that it goes on."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            store.add("beats", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _wait_while_beating(store: Store, key: str, *, seconds: float) -> None:
    """Wait for a key of the store, time and again for `seconds` while another rank is `_beating`."""
    heard = 0
    while True:
        try:
            return store.wait([key], datetime.timedelta(seconds=seconds))
        except torch.distributed.DistStoreError:
            if (beats := store.add("beats", 0)) == heard:
                raise
            heard = beats


def _new_store(timeout: datetime.timedelta) -> Store:
    """Open an empty store that all ranks share: the launcher's, or one in the memory of a process that has none."""
    store = _store()
    store.set_timeout(timeout)
    return PrefixStore(f"megatron_sppo/{next(_uses)}", store)


def store_of_its_own() -> Store:
    """Open an empty store that all ranks share, by a connection that nothing else waits on -> Store. Collective.

    A thread may use it while this process waits in a collective, and gives up on it after some seconds.
    """
    if launch().is_alone:
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = datetime.timedelta(seconds=_THREAD_TIMEOUT_SECONDS)
    connection = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    # torchrun's store outlives the ranks that it starts anew.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"megatron_sppo/{attempt}/{next(_uses)}", connection)


@functools.cache
def _store() -> Store:
    check_rendezvous()
    if launch().is_alone:
        return HashStore()
    store, _, _ = next(iter(rendezvous("env://")))
    return store


def is_initialized() -> bool:
    """Tell whether Megatron-Core's process groups are there."""
    return bool(parallel_state.model_parallel_is_initialized())


def shut_down() -> None:
    """Destroy all process groups, so that the process can end or start anew."""
    if is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_rank_zero() -> bool:
    """Tell the one rank that writes shared files and logs."""
    return launch().rank == 0


def data_parallel_rank() -> int:
    """Say which share of the global batch this rank computes -> int."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Say how many shares the global batch is divided into -> int."""
    return parallel_state.get_data_parallel_world_size()


def replicas() -> torch.distributed.ProcessGroup:
    """Return the group of the ranks that hold the same parameters as this one."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def holders_of(parameter: torch.Tensor) -> torch.distributed.ProcessGroup:
    """Return the group of the ranks that hold a parameter's very values: by Megatron-Core's marks on it."""
    if not getattr(parameter, "allreduce", True):  # an expert
        return parallel_state.get_expert_data_parallel_group()
    if getattr(parameter, "tensor_model_parallel", False):
        return replicas()
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def tensor_parallel_rank() -> int:
    """Say which shard of each weight matrix this rank holds -> int."""
    return parallel_state.get_tensor_model_parallel_rank()


def context_parallel_rank() -> int:
    """Say which part of each sequence this rank holds -> int."""
    return parallel_state.get_context_parallel_rank()


def sum_over_context(values: torch.Tensor) -> torch.Tensor:
    """Add the ranks' partial sums over the sequence -> the whole sum on each. Backward, each rank gets it undivided."""
    group = parallel_state.get_context_parallel_group()
    return tensor_parallel.reduce_from_tensor_model_parallel_region(values, group=group)


def is_first_replica() -> bool:
    """Tell whether this rank holds the first of the data-parallel copies of its parameters."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def is_first_expert_replica() -> bool:
    """Tell whether this rank holds the first of the copies of its experts."""
    return parallel_state.get_expert_data_parallel_rank() == 0


def expert_parallel_rank() -> int:
    """Say which share of each layer's experts this rank holds -> int."""
    return parallel_state.get_expert_model_parallel_rank()


def is_first_stage(vp_stage: int | None = None) -> bool:
    """Tell whether this rank (and virtual chunk) holds the embedding."""
    return parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def is_last_stage(vp_stage: int | None = None) -> bool:
    """Tell whether this rank (and virtual chunk) holds the head."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def reports_results() -> bool:
    """Tell the ranks whose results count once: last stage, tensor and context rank 0, in each data-parallel share."""
    return context_parallel_rank() == 0 and reports_tokens()


def reports_tokens() -> bool:
    """Tell the ranks whose tokens' results count once: as `reports_results`, but each context rank has its tokens."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )


def host_names() -> list[str]:
    """Name the machine of every rank -> list by rank. Collective."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, socket.gethostname())
    return found


def device() -> torch.device:
    """Return where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def broadcast_from_rank_zero(find: Callable[[], T]) -> T:
    """Let rank 0 alone find something out, and send it to the others -> the same on every rank. Collective.

    Raises:
        ConfigError, DataError, OSError: what rank 0 ran into, on every rank.
    """
    message: list[Any] = [None, None]
    if is_rank_zero():
        try:
            message[0] = find()
        except (ConfigError, DataError, OSError) as fault:
            message[1] = fault
    torch.distributed.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def failing_together(*faults: type[Exception]) -> Iterator[None]:
    """Raise what one of the ranks runs into in the block on every rank, at its end. Collective over all ranks.

    Nobody leaves the block before all have done.

    Args:
        faults: what is caught; anything else ends the rank that it befalls.
    """
    fault: Exception | None = None
    try:
        yield
    except faults as error:
        fault = error
    if not int(sum_over_world(torch.tensor([fault is not None], dtype=torch.int, device=device()))):
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, fault)
    raise next(one for one in found if one is not None)


def raise_together(fault: OSError | DataError | None) -> None:
    """Raise on every rank what one has run into, if any has. Collective over all ranks."""
    with failing_together(OSError, DataError):
        if fault is not None:
            raise fault


def sum_over_world(values: torch.Tensor) -> torch.Tensor:
    """All-reduce by addition over every rank, in place -> the same tensor."""
    torch.distributed.all_reduce(values)
    return values


def sum_to_cpu(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """All-reduce as `sum_over_world` and copy the sum to the CPU -> a function that waits for it and returns it.

    Until then nobody waits. Once the CPU has waited for anything later on the same stream, the answer is there.
    """
    sum_over_world(values)
    on_cpu = values.to("cpu", non_blocking=True)  # into page-locked memory
    if values.device.type == "cpu":
        return lambda: on_cpu
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> torch.Tensor:
        if not arrived.query():
            arrived.synchronize()
        return on_cpu

    return read


def to_device(values: torch.Tensor) -> torch.Tensor:
    """Copy a CPU tensor to where this rank computes, without waiting -> tensor."""
    return values.pin_memory().to(device(), non_blocking=True) if torch.cuda.is_available() else values


def total_sequences(num_sequences: torch.Tensor) -> torch.Tensor:
    """Add up the sequences that the last stage's ranks counted, in place -> the same tensor, on every rank.

    Collectives: broadcast from the last of the pipeline stages; sum over data- and context-parallel ranks.
    """
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(num_sequences, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(num_sequences, group=group)
    return num_sequences
