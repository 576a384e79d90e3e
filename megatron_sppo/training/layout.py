"""Which layouts a model and a world allow: by numbers alone, without torch and Megatron-Core."""

from megatron_sppo.architecture import Architecture
from megatron_sppo.errors import ConfigError
from megatron_sppo.training.config import ParallelConfig


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
    _check_delta_net(config, architecture)
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


def _check_delta_net(config: ParallelConfig, architecture: Architecture) -> None:
    """Refuse ranks that have no key head of a gated delta net: context-parallel ranks divide heads, too."""
    if architecture.delta_net is None:
        return
    heads = architecture.delta_net.linear_num_key_heads // config.tensor_model_parallel_size
    if heads % config.context_parallel_size:
        fitting = [size for size in range(1, heads + 1) if heads % size == 0]
        raise ConfigError(
            f"context_parallel_size ({config.context_parallel_size}) does not divide the {heads} key heads of a gated "
            f"delta net that each tensor-parallel rank has. Use --context-parallel-size with one of {fitting}."
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
    if architecture.add_mlp_bias and config.expert_tensor_parallel_size > 1:
        tensor = config.tensor_model_parallel_size
        raise ConfigError(
            f"{tensor} tensor-parallel ranks would split experts that have biases, and Megatron-Core would add the "
            f"bias {tensor} times. Use --expert-model-parallel-size {tensor}, which leaves experts whole."
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
    if architecture.num_expert_layers < architecture.num_layers:
        counts["feed-forward channels"] = architecture.ffn_hidden_size
    if architecture.moe_ffn_hidden_size is not None and config.expert_tensor_parallel_size > 1:
        counts["feed-forward channels of an expert"] = architecture.moe_ffn_hidden_size
    if architecture.moe_shared_expert_intermediate_size is not None:
        counts["feed-forward channels of the shared expert"] = architecture.moe_shared_expert_intermediate_size
    if architecture.delta_net is not None:
        counts["key heads of a gated delta net"] = architecture.delta_net.linear_num_key_heads
    return counts


def _divisors(counts: dict[str, int]) -> list[int]:
    return [size for size in range(1, min(counts.values()) + 1) if not any(n % size for n in counts.values())]
