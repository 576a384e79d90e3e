"""Which weights each rank holds, by formula: the shards that Megatron-Core makes of the model, and their buffers."""

import math
from dataclasses import dataclass

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.adapter_file import AdapterSettings, adapted_modules
from megatron_sppo.layer_parts import LayerKind
from megatron_sppo.model.config import padded_vocab_size
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.weight_counts import EXPERT_WEIGHTS, layer_weights, num_parameters

_START_MULTIPLE = 64
_BUCKET_MULTIPLE = 128
"""Elements; what the distributed optimizer aligns parameters and buckets to (mcore, param_and_grad_buffer.py)."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One parameter as a rank holds it."""

    name: str
    numel: int
    is_expert: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A layout in a world: how many ranks lie along each axis, and what they train."""

    parallel: ParallelConfig
    world_size: int
    adapters: AdapterSettings | None = None
    """None: the weights themselves."""

    @property
    def data_parallel_size(self) -> int:
        """Shares that the global batch is divided into."""
        return self.world_size // self.parallel.model_parallel_size

    @property
    def num_chunks(self) -> int:
        """Model chunks of a pipeline stage."""
        return self.parallel.virtual_pipeline_model_parallel_size or 1

    def layers_of_stage(self, num_layers: int, stage: int) -> int:
        """Count the layers of a pipeline stage: an even share, or what the first and last are given -> int."""
        last = self.parallel.pipeline_model_parallel_size - 1
        ends = {
            0: self.parallel.decoder_first_pipeline_num_layers,
            last: self.parallel.decoder_last_pipeline_num_layers,
        }
        given = {end: layers for end, layers in ends.items() if layers is not None}
        if stage in given:
            return given[stage]
        return (num_layers - sum(given.values())) // (last + 1 - len(given))

    def chunks_of_stage(self, num_layers: int, stage: int) -> list[range]:
        """List the layers, from 0, of each model chunk of a pipeline stage (mcore, get_transformer_layer_offset)."""
        before = sum(self.layers_of_stage(num_layers, earlier) for earlier in range(stage)) // self.num_chunks
        layers = self.layers_of_stage(num_layers, stage) // self.num_chunks
        starts = [chunk * (num_layers // self.num_chunks) + before for chunk in range(self.num_chunks)]
        return [range(start, start + layers) for start in starts]

    def most_layers(self, num_layers: int) -> int:
        """Count the layers of the fullest pipeline stage -> int."""
        return max(
            self.layers_of_stage(num_layers, stage) for stage in range(self.parallel.pipeline_model_parallel_size)
        )

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that hold copies of a dense weight, and share its optimizer state where that is distributed."""
        return self.data_parallel_size * self.parallel.context_parallel_size

    @property
    def expert_optimizer_ranks(self) -> int:
        """Ranks that hold copies of an expert."""
        stage_ranks = self.world_size // self.parallel.pipeline_model_parallel_size
        return stage_ranks // (self.parallel.expert_model_parallel_size * self.parallel.expert_tensor_parallel_size)


def layer_shards(architecture: Architecture, parallel: ParallelConfig, *, kind: LayerKind) -> list[Shard]:
    """List one layer's parameters as a rank holds them."""
    weights = layer_weights(
        architecture,
        kind=kind,
        tensor_ranks=parallel.tensor_model_parallel_size,
        expert_tensor_ranks=parallel.expert_tensor_parallel_size,
    )
    copies = {"norm": architecture.norms_per_layer}
    if kind.has_experts:
        experts = (architecture.num_moe_experts or 0) // parallel.expert_model_parallel_size
        copies |= dict.fromkeys(EXPERT_WEIGHTS, experts)
    return [
        Shard(name=name, numel=numel, is_expert=kind.has_experts and name.startswith("linear_fc"))
        for name, numel in weights.items()
        for _ in range(copies.get(name, 1))
    ]


def stage_shards(architecture: Architecture, grid: Grid, stage: int) -> list[list[Shard]]:
    """List the parameters of each model chunk on a rank of a pipeline stage -> [chunks][parameters].

    The last stage holds an output weight; a tied one is a copy of the embedding, except where the stage has that too.
    """
    parallel = grid.parallel
    last = parallel.pipeline_model_parallel_size - 1
    rows = padded_vocab_size(architecture.vocab_size, parallel.tensor_model_parallel_size)
    vocabulary = rows // parallel.tensor_model_parallel_size * architecture.hidden_size
    kinds = {kind: layer_shards(architecture, parallel, kind=kind) for kind in architecture.layer_kinds()}
    chunks = [
        [shard for layer in layers for shard in kinds[architecture.kind(layer)]]
        for layers in grid.chunks_of_stage(architecture.num_layers, stage)
    ]
    if stage == 0:
        chunks[0] = [Shard(name="embedding", numel=vocabulary), *chunks[0]]
    if stage == last:
        chunks[-1] = [*chunks[-1], Shard(name="final_norm", numel=architecture.hidden_size)]
        if not (architecture.share_embeddings_and_output_weights and last == 0):
            chunks[-1].append(Shard(name="output_layer", numel=vocabulary))
    return chunks


def adapter_shards(architecture: Architecture, grid: Grid) -> list[Shard]:
    """List one layer's adapters as a rank holds them: B or A divided as the layer's outputs or inputs are."""
    settings, parallel = grid.adapters, grid.parallel
    if settings is None:
        return []
    copies = (architecture.num_moe_experts or 0) // parallel.expert_model_parallel_size
    shards = []
    for module in adapted_modules(architecture, settings.targets):
        expert = module.is_expert
        ranks = parallel.expert_tensor_parallel_size if expert else parallel.tensor_model_parallel_size
        for matrix, (rows, columns) in module.matrices(settings.rank).items():
            is_divided = (matrix == "lora_A") != module.is_column_parallel
            shard = Shard(
                name=module.key(matrix), numel=rows * columns // (ranks if is_divided else 1), is_expert=expert
            )
            shards += [shard] * (copies if expert else 1)
    return shards


def trained_shards(architecture: Architecture, grid: Grid, stage: int) -> list[list[Shard]]:
    """List what has gradients and optimizer state: all parameters, or adapters -> as `stage_shards`."""
    if grid.adapters is None:
        return stage_shards(architecture, grid, stage)
    layers = grid.layers_of_stage(architecture.num_layers, stage) // grid.num_chunks
    return [adapter_shards(architecture, grid) * layers for _ in range(grid.num_chunks)]


def num_trained(architecture: Architecture, adapters: AdapterSettings | None) -> int:
    """Count what is trained of the whole model, and so saved -> int."""
    if adapters is None:
        return num_parameters(architecture)
    experts = architecture.num_moe_experts or 0
    return architecture.num_layers * sum(
        rows * columns * (experts if module.is_expert else 1)
        for module in adapted_modules(architecture, adapters.targets)
        for rows, columns in module.matrices(adapters.rank).values()
    )


def count(shards: list[Shard]) -> int:
    """Add up weights -> int."""
    return sum(shard.numel for shard in shards)


def rank_elements(architecture: Architecture, grid: Grid, *, trained: bool = False) -> float:
    """Count the weights that the busiest rank saves or loads, where those that hold the same ones share them -> float.

    As in a buffer, without its alignment: a stage's dense weights by their copies, its experts by theirs.

    Args:
        trained: only what is trained (`trained_shards`).
    """
    listed = trained_shards if trained else stage_shards
    found = []
    for stage in range(grid.parallel.pipeline_model_parallel_size):
        shards = [shard for chunk in listed(architecture, grid, stage) for shard in chunk]
        experts = count([shard for shard in shards if shard.is_expert])
        found.append((count(shards) - experts) / grid.optimizer_ranks + experts / grid.expert_optimizer_ranks)
    return max(found)


def buffer_elements(shards: list[Shard], grid: Grid, *, is_expert: bool) -> int:
    """Count the elements of a chunk's contiguous buffer, dense or of experts, alignment included -> int.

    Exact for one bucket; every further bucket (`overlap_grad_reduce`, 40 million elements and more) adds at most what
    one end is padded by.
    """
    numels = [shard.numel for shard in shards if shard.is_expert == is_expert]
    if not grid.parallel.use_distributed_optimizer or not numels:
        return sum(numels)
    ranks = grid.expert_optimizer_ranks if is_expert else grid.optimizer_ranks
    aligned = sum(_round_up(numel, _START_MULTIPLE) for numel in numels)
    return _round_up(aligned, math.lcm(ranks, _BUCKET_MULTIPLE))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
