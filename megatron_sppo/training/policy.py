"""The policy on this rank: its pipeline stage(s), wrapped for data parallelism, and what identifies its weights."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer import TransformerConfig

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.adapter_file import AdapterSettings
from megatron_sppo.errors import ConfigError
from megatron_sppo.model import adapters as low_rank
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import PolicyModel, build_stage
from megatron_sppo.model.router_losses import METRICS
from megatron_sppo.model.transformer_config import mcore_dataclass, parse_overrides, shared_fields, transformer_config
from megatron_sppo.training import parallel
from megatron_sppo.training.config import ParallelConfig

_HASH_BITS = 48
"""Partial sums of 48 bits leave room to add 32768 ranks in an int64 without overflow."""

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.in_proj.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Transformer Engine's names of norms inside the linear layers that it fuses them with -> the torch spec's."""
_LOCAL_EXPERT = re.compile(
    r"\.experts\.local_experts\.(?P<expert>\d+)\.(?P<module>linear_fc[12])\.(?P<kind>weight|bias)$"
)
_GROUPED_EXPERT = re.compile(r"\.experts\.(?P<module>linear_fc[12])\.(?P<kind>weight|bias)(?P<expert>\d+)$")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model chunks that this rank holds: one, or several under the interleaved pipeline schedule."""

    architecture: Architecture
    config: TransformerConfig
    chunks: tuple[DistributedDataParallel, ...]
    adapters: AdapterSettings | None = None
    """None: the weights themselves are trained."""

    def pop_router_sums(self) -> torch.Tensor:
        """Add up this rank's losses of routers since the last call -> [2] float64 on the device, by `METRICS`."""
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=parallel.device())
        for losses in (losses for stage in self.stages for losses in stage.router_losses):
            sums += losses.pop_sums()
        return sums

    def router_metrics(self, sums: torch.Tensor, *, num_sequences: int) -> dict[str, float]:
        """Average the routers' losses, added up over all ranks, over mixtures and sequences -> {metric: value}.

        Empty without such losses.
        """
        if not any(stage.router_losses for stage in self.stages):
            return {}
        means = sums / (num_sequences * self.architecture.num_expert_layers)
        return dict(zip(METRICS, means.tolist(), strict=True))

    def gather_weights(self) -> None:
        """Bring every weight up to date, where gathering waits for the next forward. Collective.

        With overlap_param_gather a rank has new values of its own shard alone between a step and the next.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    @property
    def stages(self) -> tuple[PolicyModel, ...]:
        """The chunks without their data-parallel wrapper."""
        return tuple(chunk.module for chunk in self.chunks)


def mcore_config(architecture: Architecture, model: ModelConfig, layout: ParallelConfig) -> TransformerConfig:
    """Describe model and layout to Megatron-Core -> TransformerConfig, with what its schedules and DDP need."""
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    config = transformer_config(
        architecture,
        model,
        **shared_fields(layout),
        num_layers_in_first_pipeline_stage=layout.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=layout.decoder_last_pipeline_num_layers,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        # Interleaving with batched, blocking p2p gives wrong losses silently (measured, megatron-core 0.16.1, gloo).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (interleaved, not interleaved)
    assert not config.variable_seq_lengths
    return config


def mcore_ddp_config(layout: ParallelConfig) -> DistributedDataParallelConfig:
    """Describe to Megatron-Core how gradients are reduced -> DistributedDataParallelConfig.

    Raises:
        ConfigError: an unknown or refused KEY=VALUE, or a combination that cannot be.
    """
    values: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": layout.use_distributed_optimizer,
        "check_for_nan_in_grad": False,  # the loop looks at the loss before it steps
        "average_in_collective": False,
    }
    values |= parse_overrides(layout.ddp_config, DistributedDataParallelConfig, flag="--ddp-config", taken=values)
    config = mcore_dataclass(DistributedDataParallelConfig, values)
    if config.overlap_param_gather and not layout.use_distributed_optimizer:
        raise ConfigError(
            "--ddp-config overlap_param_gather=true gathers the weights that the ranks of a sharded optimizer have "
            "updated, and here each rank updates all. Use --use-distributed-optimizer beside it, or remove it."
        )
    return config


def build_policy(
    architecture: Architecture,
    model: ModelConfig,
    layout: ParallelConfig,
    *,
    adapters: AdapterSettings | None = None,
    seed: int = 0,
) -> Policy:
    """Build this rank's stages with random weights and wrap them in Megatron's DDP -> Policy.

    Gradients are accumulated and reduced in float32 whatever the weights' type. With adapters all weights are frozen,
    and have neither gradients nor optimizer state.

    Args:
        seed: of the adapters' A.
    """
    config, ddp_config = mcore_config(architecture, model, layout), mcore_ddp_config(layout)
    chunks = []
    for index, stage in enumerate(_stages(architecture, config, model, layout)):
        stage.to(parallel.device())
        _set_experts_apart(stage)
        if adapters is not None:
            low_rank.attach_adapters(stage, architecture, adapters, seed=seed)
        chunk = DistributedDataParallel(config=config, ddp_config=ddp_config, module=stage, disable_bucketing=index > 0)
        if ddp_config.overlap_param_gather and stage.post_process and adapters is None:
            _gather_the_head_s_weight_in_time(chunk, stage)
        chunks.append(chunk)
    config.finalize_model_grads_func = reduce_gradients
    if ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return Policy(architecture=architecture, config=config, chunks=tuple(chunks), adapters=adapters)


def _gather_the_head_s_weight_in_time(chunk: DistributedDataParallel, stage: PolicyModel) -> None:
    """Wait for the output weight's new values in front of the final norm, the last module to be called.

    With overlap_param_gather Megatron does so in front of the forward of the module that owns a weight, and the head
    takes the weight without calling its module.
    """
    tied = stage.share_embeddings_and_output_weights
    weight = stage.shared_embedding_or_output_weight() if tied else stage.output_layer.weight

    def gather(*_: object) -> None:
        chunk.param_to_bucket_group[weight].finish_param_sync(chunk.ddp_config.align_param_gather)

    stage.decoder.final_layernorm.register_forward_pre_hook(gather)


def reduce_gradients(model: Sequence[Any], num_sequences: torch.Tensor, **settings: Any) -> None:
    """Reduce gradients over the ranks and divide them by the sequences of the global batch. Collective.

    As Megatron's finalize_model_grads with `num_sequences` for its tokens, but the CPU does not wait to see whether
    there are any (`if num_tokens > 0`, megatron-core 0.16.1 distributed/finalize_model_grads.py).
    """
    finalize_model_grads(model, None, **settings)
    scaling = 1.0 / parallel.total_sequences(num_sequences).clamp(min=1)
    for chunk in model:
        chunk.scale_gradients(scaling)


def _stages(
    architecture: Architecture, config: TransformerConfig, model: ModelConfig, layout: ParallelConfig
) -> Iterator[PolicyModel]:
    virtual = layout.virtual_pipeline_model_parallel_size
    for vp_stage in range(virtual) if virtual is not None else [None]:
        yield build_stage(
            architecture,
            config,
            model,
            pre_process=parallel.is_first_stage(vp_stage),
            post_process=parallel.is_last_stage(vp_stage),
            vp_stage=vp_stage,
        )


def _set_experts_apart(stage: PolicyModel) -> None:
    """Mark the experts for their own gradient buffers and optimizer, even where no rank divides them.

    Megatron-Core marks them (`allreduce`) only where there are several expert-parallel ranks, and names the optimizer's
    state after that: a run could then not go on with one rank for the experts where it had two.
    """
    for name, parameter in stage.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
            # Megatron-Core takes the bias of a row-parallel expert for one that tensor-parallel ranks hold alike
            # (0.16.1, tensor_parallel/layers.py): it would add up the gradients of other experts' biases, and leave
            # those of all ranks but the first out of the gradient's norm.
            parameter.sequence_parallel, parameter.tensor_model_parallel = False, True


@torch.no_grad()
def zero_padded_vocabulary(stages: Sequence[PolicyModel]) -> None:
    """Zero the embedding and output rows beyond the true vocabulary, which no checkpoint holds."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                first_row = parallel.tensor_parallel_rank() * parameter.shape[0]
                parameter[max(0, stage.true_vocab_size - first_row) :] = 0


def weights_hash(stages: Sequence[PolicyModel]) -> str:
    """Hash the weights' bits, the same in every layout and layer spec -> 12 hex digits. Collective over all ranks.

    Each parameter's bit patterns are added as integers and weighted by a hash of its global name, modulo 2^48:
    additions commute, so shards and stages may be summed in any order. Adapters are left out: `adapters_hash`.
    """
    return _hash_of(_own_parameters(stages))


def adapters_hash(stages: Sequence[PolicyModel]) -> str | None:
    """Hash the adapters as `weights_hash` the weights -> 12 hex digits; None where they add nothing. Collective."""
    own = {name: parameter for stage in stages for name, parameter in _own_adapters(stage)}
    added = torch.zeros(1, dtype=torch.int64, device=parallel.device())
    for name, parameter in own.items():
        if "lora_B" in name:
            added += parameter.detach().count_nonzero()
    found = _hash_of(own.items())
    return found if int(parallel.sum_over_world(added)) else None


def _own_adapters(stage: PolicyModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the adapters' parameters that this rank alone answers for, by names that hold in every layout."""
    for adapter in stage.adapters.each():
        first = parallel.is_first_expert_replica() if adapter.is_expert else parallel.is_first_replica()
        for name, parameter in adapter.names():
            if first and (adapter.group.rank() == 0 or getattr(parameter, "tensor_model_parallel", False)):
                yield name, parameter


def _hash_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    total = 0
    for name, parameter in parameters:
        factor = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") | 1
        bits = parameter.detach().view(torch.int16 if parameter.element_size() == 2 else torch.int32)
        total += factor * int(bits.sum(dtype=torch.int64))
    partial = torch.tensor([total % (1 << _HASH_BITS)], dtype=torch.int64, device=parallel.device())
    return f"{int(parallel.sum_over_world(partial)) % (1 << _HASH_BITS):012x}"


def _weights(stage: PolicyModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from stage.named_parameters()
    yield from (pair for pair in stage.named_buffers() if pair[0].endswith(".router.expert_bias"))


def _own_parameters(stages: Sequence[PolicyModel]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that this rank alone answers for, by the torch spec's names in the whole model.

    Parameters, and the biases of routers, which no gradient changes and all else depends on.
    """
    for stage in stages:
        for name, parameter in named_weights(stage):
            if name.startswith(f"{low_rank.NAME}.") or not _answers_for(parameter):
                continue
            if stage.share_embeddings_and_output_weights and name == "output_layer.weight":
                continue  # the last stage's copy of the tied embedding
            for fused, apart in _FUSED_NORMS.items():
                name = name.replace(fused, apart)
            yield _global_expert(name, stage.config), parameter


def named_weights(stage: PolicyModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a stage's parameters and its routers' biases, layers numbered as in the whole model -> (name, tensor)."""
    offsets = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(stage.decoder.layers)}
    for name, parameter in _weights(stage):
        for prefix, layer in offsets.items():
            if name.startswith(prefix):
                name = f"decoder.layers.{layer}.{name.removeprefix(prefix)}"
                break
        yield name, parameter


def _answers_for(parameter: torch.Tensor) -> bool:
    """Tell whether this rank is the first of those that hold the same values."""
    if not getattr(parameter, "allreduce", True):  # an expert
        return parallel.is_first_expert_replica()
    if not getattr(parameter, "tensor_model_parallel", False) and parallel.tensor_parallel_rank() > 0:
        return False
    return parallel.is_first_replica()


def _global_expert(name: str, config: TransformerConfig) -> str:
    """Number an expert's parameter as in the whole model, in the naming of both layer specs; leave others alone."""
    found = _LOCAL_EXPERT.search(name) or _GROUPED_EXPERT.search(name)
    if found is None:
        return name
    per_rank = (config.num_moe_experts or 0) // config.expert_model_parallel_size
    expert = parallel.expert_parallel_rank() * per_rank + int(found["expert"])
    return f"{name[: found.start()]}.experts.{expert}.{found['module']}.{found['kind']}"
