"""Bytes of a rank of each pipeline stage: what it always holds, and the most that it holds beside it."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sppo.architecture import Architecture
from megatron_sppo.layer_parts import LayerKind
from megatron_sppo.model.config import ModelConfig, padded_vocab_size
from megatron_sppo.objective.chunk_size import NUM_BUFFERS, default_chunk_size
from megatron_sppo.planning.activations import FLOAT32, Activations, MicroBatchShape, activations
from megatron_sppo.planning.config import MachineConfig
from megatron_sppo.planning.parameters import Grid, Shard, buffer_elements, count, stage_shards, trained_shards

GIB = 1 << 30

_MATRICES = (
    *("linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2"),
    *("shared_experts.linear_fc1", "shared_experts.linear_fc2"),
)


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """One rank of a pipeline stage, in bytes."""

    stage: int
    num_parameters: int
    weights: int
    gradients: int
    """DDP's float32 buffers."""
    optimizer: int
    """float32 master weights (for bfloat16) and two moments, this rank's share."""
    fp8_weights: int
    """Transformer Engine's FP8 copies of the layers' matrices, as they are and transposed."""
    activations: int
    """Kept by all micro-batches in flight."""
    adapters: int = 0
    """Adapters, where they are trained; `weights` are then frozen, and gradients and optimizer state the adapters'."""
    working: int
    """What recomputation, a layer's or the head's backward pass takes on top."""
    allowance: int
    """CUDA context, communication buffers, fragmentation; 0 on a CPU."""

    @property
    def total(self) -> int:
        """The most that is held at one time."""
        return self.resident + self.activations + self.working + self.allowance

    @property
    def resident(self) -> int:
        """Held all the time."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.fp8_weights


def chunks_in_flight(grid: Grid, stage: int, *, num_micro_batches: int) -> int:
    """Count the forward passes of model chunks that wait for their backward pass -> int.

    One forward, one backward (mcore, schedules.py): stage s of P warms up with P - s - 1 micro-batches; interleaved
    with V chunks, with 2 (P - s - 1) + (V - 1) P passes of a chunk; one more is in flight while they alternate.
    """
    stages, chunks = grid.parallel.pipeline_model_parallel_size, grid.num_chunks
    behind = stages - stage - 1
    warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * stages
    return min(warm_up + 1, num_micro_batches * chunks)


def stage_memory(
    architecture: Architecture,
    model: ModelConfig,
    grid: Grid,
    shape: MicroBatchShape,
    *,
    stage: int,
    num_micro_batches: int,
    optimizer: str,
    engine: bool,
    machine: MachineConfig | None,
) -> StageMemory:
    """Add up one rank of a pipeline stage -> StageMemory.

    Args:
        shape: the largest micro-batch.
        optimizer: adam or rmsprop.
        engine: Transformer Engine's spec; otherwise torch's.
        machine: whose allowance is added; None for none (a CPU rank's tensors alone).
    """
    chunks = stage_shards(architecture, grid, stage)
    shards = [shard for chunk in chunks for shard in chunk]
    trained = trained_shards(architecture, grid, stage)
    elements = {
        expert: sum(buffer_elements(chunk, grid, is_expert=expert) for chunk in trained) for expert in (False, True)
    }
    held = sum(elements.values()) * model.type_bytes
    frozen = 0 if grid.adapters is None else count(shards) * model.type_bytes
    kept = {
        kind: activations(architecture, model, grid, shape, engine=engine, kind=kind)
        for kind in architecture.layer_kinds()
    }
    waiting = chunks_in_flight(grid, stage, num_micro_batches=num_micro_batches)
    in_flight = _in_flight(architecture, grid, kept, stage, waiting)
    in_flight += waiting * _pipeline_buffers(architecture, model, grid, shape, stage, engine=engine)
    working = _working(
        architecture,
        model,
        grid,
        shape,
        kept,
        shards,
        is_last=stage == grid.parallel.pipeline_model_parallel_size - 1,
        engine=engine,
    )
    allowance = 0
    if machine is not None:
        allowance = round(machine.context_gib * GIB + machine.fragmentation * (in_flight + working))
    fp8 = 2 * sum(shard.numel for shard in shards if shard.name in _MATRICES) if engine and model.fp8 != "none" else 0
    return StageMemory(
        stage=stage,
        num_parameters=count(shards),
        weights=frozen or held,
        adapters=held if frozen else 0,
        gradients=sum(elements.values()) * FLOAT32,
        optimizer=_optimizer(elements, model, grid, optimizer),
        fp8_weights=fp8,
        activations=in_flight,
        working=working,
        allowance=allowance,
    )


def _optimizer(elements: dict[bool, int], model: ModelConfig, grid: Grid, name: str) -> int:
    """Adam's two float32 moments or RMSprop's one, and a float32 copy of narrower weights -> bytes of a rank."""
    each = ((1 if name == "rmsprop" else 2) + (model.type_bytes < FLOAT32)) * FLOAT32
    if not grid.parallel.use_distributed_optimizer:
        return sum(elements.values()) * each
    return elements[False] // grid.optimizer_ranks * each + elements[True] // grid.expert_optimizer_ranks * each


def _in_flight(
    architecture: Architecture, grid: Grid, kept: Mapping[LayerKind, Activations], stage: int, waiting: int
) -> int:
    """What the waiting passes keep: of their layers; the embedding's and the head's only of their own chunk.

    Where layers are of two kinds, every pass is taken to be of the chunk that keeps the most.
    """
    stages = grid.parallel.pipeline_model_parallel_size
    layers = max(
        sum(kept[architecture.kind(layer)].per_layer for layer in chunk)
        for chunk in grid.chunks_of_stage(architecture.num_layers, stage)
    )
    ends = next(iter(kept.values()))
    whole = -(-waiting // grid.num_chunks)
    first = whole * ends.first if stage == 0 else 0
    last = ends.last if stage == stages - 1 else 0
    return waiting * layers + first + last


def _pipeline_buffers(
    architecture: Architecture, model: ModelConfig, grid: Grid, shape: MicroBatchShape, stage: int, *, engine: bool
) -> int:
    """What a schedule holds of each waiting pass: the tensor that came in, and on a CPU the one that went out -> bytes.

    Transformer Engine's first norm keeps what came in anyway, as does ours in float32.
    """
    parallel = grid.parallel
    if parallel.pipeline_model_parallel_size == 1 or engine:
        return 0
    tokens = shape.num_tokens // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    tensor = tokens * architecture.hidden_size * model.type_bytes
    came_in = stage > 0 and model.type_bytes < FLOAT32
    went_out = stage < parallel.pipeline_model_parallel_size - 1
    return tensor * (came_in + went_out)


def _working(
    architecture: Architecture,
    model: ModelConfig,
    grid: Grid,
    shape: MicroBatchShape,
    kept: Mapping[LayerKind, Activations],
    shards: list[Shard],
    *,
    is_last: bool,
    engine: bool,
) -> int:
    """Find the costliest moment of a backward pass, beyond what is kept -> bytes: a layer's, or the head's."""
    layer = max(kind.recomputed + kind.working for kind in kept.values())
    if grid.adapters is None:  # a weight's gradient, before it is added to its buffer
        layer += max(shard.numel for shard in shards if shard.name in _MATRICES) * model.type_bytes
    if not is_last:
        return layer
    # What the head kept is gone before the last layer's turn.
    return max(layer - next(iter(kept.values())).last, head_workspace(architecture, model, grid, shape, engine=engine))


def head_workspace(
    architecture: Architecture, model: ModelConfig, grid: Grid, shape: MicroBatchShape, *, engine: bool
) -> int:
    """Size the head's backward pass (objective/log_ratio.py) -> bytes.

    Beside the gradient of the hidden states: first the ring of logits that forward left and the products of a block,
    then, the ring gone, the placeholder that autograd is given for the weight's gradient.
    """
    tensor, narrow = grid.parallel.tensor_model_parallel_size, model.type_bytes
    rows = padded_vocab_size(architecture.vocab_size, tensor) // tensor
    tokens, hidden = shape.num_response_tokens, architecture.hidden_size
    chunk = model.head_chunk_size or default_chunk_size(rows, narrow, device_type="cuda" if engine else "cpu")
    logits = min(chunk, tokens) * rows
    blocks = logits * narrow
    if not engine:  # the CPU lays the hidden states out anew, and rounds each product before it is added
        columns = max(1, logits // max(tokens, 1) // NUM_BUFFERS["cpu"])
        blocks += tokens * hidden * narrow + max(tokens, columns) * hidden * (narrow if narrow < FLOAT32 else 0)
    weight = rows * hidden * narrow if grid.adapters is None else 0
    return max(blocks + tokens * hidden * FLOAT32, weight + tokens * hidden * (FLOAT32 + narrow))
