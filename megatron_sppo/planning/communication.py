"""Bytes that one GPU sends in a training step, by axis, and the seconds that they take at the assumed bandwidths.

A ring moves (p - 1) / p of the data through each GPU for a gather or a scatter of sums, twice that for a sum on all.
`gradients` and `weights` are the data-parallel axis, as the distributed optimizer uses it.
Ranks lie in Megatron's order, tensor-parallel ones next to each other, then context, data and pipeline: an axis stays
within a node if its stride times its size does.
"""

from dataclasses import dataclass

from megatron_sppo.architecture import Architecture
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.planning.activations import FLOAT32
from megatron_sppo.planning.config import MachineConfig
from megatron_sppo.planning.parameters import Grid, buffer_elements, trained_shards


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one axis moves through a GPU in a step."""

    axis: str
    num_bytes: float
    seconds: float
    may_hide: bool = False
    """Runs behind the last micro-batch's backward pass (`overlap_grad_reduce`)."""


def step_traffic(
    architecture: Architecture,
    model: ModelConfig,
    grid: Grid,
    machine: MachineConfig,
    *,
    tokens_per_rank: float,
) -> list[Traffic]:
    """List the axes that have more than one rank, of the busiest pipeline stage.

    Args:
        tokens_per_rank: tokens of a step in each data-parallel share and context-parallel part, all micro-batches.
    """
    parallel = grid.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    stage_ranks = grid.world_size // parallel.pipeline_model_parallel_size
    spans = {
        "tensor": tensor,
        "context": tensor * context,
        "expert": parallel.expert_model_parallel_size,
        "pipeline": grid.world_size,
        "gradients": stage_ranks,
        "weights": stage_ranks,
    }
    volumes = {
        "tensor": _tensor(architecture, model, grid, tokens_per_rank),
        "context": _context(architecture, model, grid, tokens_per_rank),
        "expert": _expert(architecture, model, grid, tokens_per_rank),
        "pipeline": _pipeline(architecture, model, grid, tokens_per_rank),
        "gradients": _data(architecture, grid, FLOAT32 * (1 if parallel.use_distributed_optimizer else 2)),
        "weights": _data(architecture, grid, model.type_bytes) if parallel.use_distributed_optimizer else 0.0,
    }
    overlapped = any(pair.replace(" ", "").lower() == "overlap_grad_reduce=true" for pair in parallel.ddp_config)
    lines = []
    for axis, volume in volumes.items():
        if volume:
            bandwidth = machine.node_gb_per_s if spans[axis] <= machine.gpus_per_node else machine.network_gb_per_s
            seconds, hides = volume / bandwidth / 1e9, overlapped and axis == "gradients"
            lines.append(Traffic(axis=axis, num_bytes=volume, seconds=seconds, may_hide=hides))
    return lines


def _passes(model: ModelConfig) -> int:
    """Forward passes of a layer: one more where it is computed again in full."""
    return 2 if model.recompute_granularity == "full" else 1


def _tensor(architecture: Architecture, model: ModelConfig, grid: Grid, tokens: float) -> float:
    """Each layer gathers before two products and scatters sums after two others, forward and backward.

    With sequence parallelism backward gathers the two inputs once more, for their weights' gradients. Without, two sums
    on all ranks a pass: as much as a gather and a scatter each. Adapters send their `rank` channels alone: left out.
    """
    size = grid.parallel.tensor_model_parallel_size
    if size == 1:
        return 0.0
    unit = tokens * architecture.hidden_size * model.type_bytes * (size - 1) / size
    backward = 6 if grid.parallel.sequence_parallel and grid.adapters is None else 4
    return grid.most_layers(architecture.num_layers) * unit * (4 * _passes(model) + backward)


def _pipeline(architecture: Architecture, model: ModelConfig, grid: Grid, tokens: float) -> float:
    """Activations to the next stage and gradients back, for each chunk of the stage."""
    parallel = grid.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return 0.0
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return 2 * grid.num_chunks * tokens / split * architecture.hidden_size * model.type_bytes


def _context(architecture: Architecture, model: ModelConfig, grid: Grid, tokens: float) -> float:
    """Keys and values once around the ring forward; with their gradients backward."""
    parallel = grid.parallel
    size = parallel.context_parallel_size
    if size == 1:
        return 0.0
    keys = 2 * architecture.key_channels // parallel.tensor_model_parallel_size
    once = tokens * (size - 1) * keys * model.type_bytes
    return grid.most_layers(architecture.num_layers) * once * (_passes(model) + 2)


def _expert(architecture: Architecture, model: ModelConfig, grid: Grid, tokens: float) -> float:
    """Every token to each of its experts and back, forward and backward."""
    parallel = grid.parallel
    size = parallel.expert_model_parallel_size
    if size == 1:
        return 0.0
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    once = tokens / split * (architecture.moe_router_topk or 0) * architecture.hidden_size * model.type_bytes
    layers = max(
        sum(architecture.has_experts(layer) for chunk in chunks for layer in chunk)
        for chunks in (
            grid.chunks_of_stage(architecture.num_layers, stage)
            for stage in range(parallel.pipeline_model_parallel_size)
        )
    )
    return layers * 2 * once * (size - 1) / size * (_passes(model) + 1)


def _data(architecture: Architecture, grid: Grid, element_bytes: int) -> float:
    """Each weight's gradient, or the weight, through a ring of those who hold it, on the busier of the end stages."""
    worst = 0.0
    for stage in {0, grid.parallel.pipeline_model_parallel_size - 1}:
        volume = 0.0
        for chunk in trained_shards(architecture, grid, stage):
            for is_expert, ranks in ((False, grid.optimizer_ranks), (True, grid.expert_optimizer_ranks)):
                elements = buffer_elements(chunk, grid, is_expert=is_expert)
                volume += elements * element_bytes * (ranks - 1) / ranks
        worst = max(worst, volume)
    return worst
