"""Process groups: which rank holds what. The only reader in training of `parallel_state`."""

import datetime
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megatron_sppo.architecture import Architecture
from megatron_sppo.command_line import launch
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.training import cpu
from megatron_sppo.training.config import ParallelConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")


def check_layout(config: ParallelConfig, architecture: Architecture, *, world_size: int) -> None:
    """Refuse a layout that does not divide the model or the world, before any process group exists.

    Raises:
        ConfigError: names both numbers and a size that fits.
    """
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    counts = _split_counts(config, architecture)
    for what, count in counts.items():
        if count % tensor:
            fitting = _divisors(counts)
            raise ConfigError(
                f"tensor_model_parallel_size ({tensor}) does not divide the model's {count} {what}. "
                f"Use --tensor-model-parallel-size with one of {fitting}."
            )
    _check_stages(config, architecture.num_layers)
    if world_size % config.model_parallel_size:
        raise ConfigError(
            f"{world_size} ranks cannot be divided into model replicas of {config.model_parallel_size} "
            f"(TP {tensor} x PP {pipeline} x CP {config.context_parallel_size}). "
            f"Use torchrun --nproc-per-node {config.model_parallel_size} or a multiple of it."
        )
    _check_experts(config, architecture, world_size=world_size)


def _check_stages(config: ParallelConfig, num_layers: int) -> None:
    stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    ends = (config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers)
    given = [layers for layers in ends if layers is not None]
    between, rest = stages - len(given), num_layers - sum(given)
    if not given:
        if num_layers % (stages * chunks):
            fitting = [size for size in range(1, num_layers + 1) if num_layers % size == 0]
            raise ConfigError(
                f"{num_layers} layers cannot be divided evenly into {stages * chunks} pipeline chunks. "
                f"Use --pipeline-model-parallel-size (times virtual chunks) with one of {fitting}, or "
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers."
            )
        return
    if any(layers % chunks for layers in given):
        raise ConfigError(
            f"first and last stage of {given} layers cannot be divided evenly into {chunks} virtual chunks. "
            f"Use multiples of {chunks}."
        )
    if rest != 0 if between == 0 else rest < 1 or rest % (between * chunks):
        raise ConfigError(
            f"{num_layers} layers without the {sum(given)} of first and last stage leave {rest}, which cannot be "
            f"divided evenly into {between * chunks} pipeline chunks. Change --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers."
        )


def _check_experts(config: ParallelConfig, architecture: Architecture, *, world_size: int) -> None:
    ranks, experts = config.expert_model_parallel_size, architecture.num_moe_experts
    if experts is None:
        if ranks > 1:
            raise ConfigError(
                f"expert_model_parallel_size {ranks} divides the experts of a mixture, and this model is dense "
                f"({architecture.family}). Use --expert-model-parallel-size 1."
            )
        return
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ConfigError(
            "a mixture of experts under tensor parallelism needs sequence parallelism (Megatron-Core trains it with no "
            "other). Add --sequence-parallel."
        )
    if experts % ranks:
        fitting = [size for size in range(1, experts + 1) if experts % size == 0]
        raise ConfigError(
            f"expert_model_parallel_size ({ranks}) does not divide the model's {experts} experts. "
            f"Use --expert-model-parallel-size with one of {fitting}."
        )
    # With experts left whole these ranks lie across the tensor-, context- and data-parallel ones of a stage.
    stage_ranks = world_size // config.pipeline_model_parallel_size
    if ranks > 1 and stage_ranks % ranks:
        fitting = [size for size in range(1, stage_ranks + 1) if stage_ranks % size == 0 and experts % size == 0]
        raise ConfigError(
            f"the {stage_ranks} ranks of a pipeline stage cannot be divided into groups of "
            f"expert_model_parallel_size {ranks}. Use --expert-model-parallel-size with one of {fitting}."
        )


def _split_counts(config: ParallelConfig, architecture: Architecture) -> dict[str, int]:
    """Name what tensor parallelism splits -> {words: how many}."""
    counts = {
        "attention heads": architecture.num_attention_heads,
        "key/value heads": architecture.num_query_groups,
    }
    if architecture.moe_ffn_hidden_size is None:
        return {**counts, "feed-forward channels": architecture.ffn_hidden_size}
    if config.expert_tensor_parallel_size > 1:
        return {**counts, "feed-forward channels of an expert": architecture.moe_ffn_hidden_size}
    return counts


def _divisors(counts: dict[str, int]) -> list[int]:
    return [size for size in range(1, min(counts.values()) + 1) if not any(n % size for n in counts.values())]


def initialize(config: ParallelConfig, *, seed: int) -> None:
    """Start torch.distributed and all of Megatron-Core's process groups, and seed the model-parallel RNG.

    NCCL on CUDA, gloo on the CPU. A single process needs no launcher.
    """
    cpu.install()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launch().local_rank)
    if not torch.distributed.is_initialized():
        # A single process needs no launcher: a store in its own memory takes the place of torchrun's.
        alone: dict[str, Any] = {}
        if launch().is_alone:
            alone = {"store": HashStore(), "rank": 0, "world_size": 1}
        timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, **alone)
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


def total_terms(num_terms: torch.Tensor) -> torch.Tensor:
    """Add up the loss terms that the last stage's ranks counted, in place -> the same tensor, on every rank.

    Collectives: broadcast from the last of the pipeline stages; sum over data- and context-parallel ranks.
    """
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(num_terms, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(num_terms, group=group)
    return num_terms
