"""Expected seconds of a step and of an iteration's stages: counted work over assumed rates. An estimate."""

from dataclasses import dataclass

from megatron_sppo import flops
from megatron_sppo.architecture import Architecture
from megatron_sppo.data.schema import parse_selection
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.planning.communication import Traffic, step_traffic
from megatron_sppo.planning.config import MachineConfig, PlanConfig
from megatron_sppo.planning.parameters import Grid
from megatron_sppo.weight_counts import num_parameters

_TERA = 1e12
_PAIRRM_BACKBONE = 304e6
"""Weights of DeBERTa-v3-large without its embedding."""
_PAIRRM_LIMITS = (1224, 412)
"""Tokens of the source and of each candidate that PairRM reads."""
_DATA_AXES = ("gradients", "weights")
_SAMPLER_SHARE = 0.6
"""Share of a GPU's memory that a sampler gives to weights; the rest is for keys and values."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One optimizer step."""

    num_micro_batches: int
    """Of each data-parallel rank."""
    num_tokens: float
    """Real tokens of the global batch."""
    model_flops: float
    """Forward and backward of the whole batch, nothing counted twice."""
    compute_seconds: float
    """Of the busiest pipeline stage, recomputation included."""
    bubble_fraction: float
    """Share of the step in which a stage waits for the pipeline to fill and drain."""
    traffic: tuple[Traffic, ...]
    seconds: float

    def tokens_per_gpu(self, world_size: int) -> float:
        """Tokens a second for each GPU."""
        return self.num_tokens / self.seconds / world_size

    def tflops_per_gpu(self, world_size: int) -> float:
        """Model TFLOP/s for each GPU."""
        return self.model_flops / self.seconds / world_size / _TERA


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What an iteration and a step hold, from means."""

    num_rows: int
    mean_tokens: float
    rows_per_step: int
    num_steps: int


def workload(config: PlanConfig) -> Workload:
    """Count rows, steps and mean lengths -> Workload."""
    given, batch = config.workload, config.batch
    pairs = config.objective.row.needs_pairs
    chosen = parse_selection(batch.selection or ("extremes" if pairs else "all"))
    most = given.num_responses
    if pairs and chosen.kind == "all":
        most *= given.num_responses - 1  # an answer is a row of each of its pairs (`data.selection`)
    trained = given.responses_trained or (most if chosen.kind == "all" else 2 * chosen.num_each)
    mean = given.mean_prompt_tokens + given.mean_response_tokens
    rows = given.num_prompts * min(trained, most)
    return Workload(
        num_rows=rows,
        mean_tokens=min(mean, batch.seq_length or mean),
        rows_per_step=batch.global_batch_size,
        num_steps=batch.num_steps(-(-rows // batch.global_batch_size)),
    )


def num_micro_batches(config: PlanConfig, grid: Grid, work: Workload) -> int:
    """Count the micro-batches of a data-parallel rank in a step -> int."""
    budget = config.batch.packed_sequence_size
    if budget is not None:
        return max(1, -(-round(work.rows_per_step * work.mean_tokens) // (budget * grid.data_parallel_size)))
    return -(-work.rows_per_step // (config.batch.micro_batch_size * grid.data_parallel_size))


def step_time(architecture: Architecture, config: PlanConfig, grid: Grid) -> StepTime:
    """Estimate one optimizer step -> StepTime.

    A stage computes its micro-batches one after the other; the pipeline of P stages and V chunks idles for (P - 1) / V
    of a micro-batch's time more. Traffic that is not hidden adds to it.
    """
    model, machine, work = config.model, config.machine, workload(config)
    parallel, response = grid.parallel, config.workload.mean_response_tokens
    num = num_micro_batches(config, grid, work)
    tokens = work.rows_per_step * work.mean_tokens
    attended = work.rows_per_step * work.mean_tokens * (work.mean_tokens + 1) / 2
    counts = {
        "num_tokens": tokens,
        "attended_positions": attended,
        "num_response_tokens": work.rows_per_step * response,
    }
    forward, backward, again = _stage_seconds(architecture, model, machine, grid, counts, num_micro_batches=num)
    compute = forward + backward + again
    ranks = grid.data_parallel_size * parallel.context_parallel_size
    traffic = step_traffic(architecture, model, grid, machine, tokens_per_rank=tokens / ranks)
    between = sum(line.seconds for line in traffic if line.axis not in _DATA_AXES)
    stages = parallel.pipeline_model_parallel_size
    idle = (stages - 1) / (num * grid.num_chunks)
    behind = backward / num  # the last micro-batch's backward pass
    at_the_end = sum(
        max(0.0, line.seconds - behind) if line.may_hide else line.seconds
        for line in traffic
        if line.axis in _DATA_AXES
    )
    return StepTime(
        num_micro_batches=num,
        num_tokens=tokens,
        model_flops=flops.training_flops(architecture, **counts, is_frozen=grid.adapters is not None),
        compute_seconds=compute,
        bubble_fraction=idle / (1 + idle),
        traffic=tuple(traffic),
        seconds=(compute + between) * (1 + idle) + at_the_end,
    )


def _stage_seconds(
    architecture: Architecture,
    model: ModelConfig,
    machine: MachineConfig,
    grid: Grid,
    counts: dict[str, float],
    *,
    num_micro_batches: int,
) -> tuple[float, float, float]:
    """Time the busiest stage's forward and backward passes, and what backward computes again -> seconds each.

    FP8 speeds the layers' products alone, down to what the host needs to launch them; attention and the head stay in
    bfloat16. The last stage has the head.
    """
    parallel = grid.parallel
    stages = parallel.pipeline_model_parallel_size
    ranks = grid.world_size / stages
    product_rate = (machine.fp8_tflops if model.fp8 != "none" else machine.bf16_tflops) * _TERA * ranks
    rate = machine.bf16_tflops * _TERA * ranks
    layers, per_token = _busiest_layers(architecture, grid)
    products = per_token * counts["num_tokens"] / product_rate
    attention = layers * flops.attention_flops_per_position(architecture) * counts["attended_positions"] / rate
    if model.fp8 != "none":
        launched = architecture.num_layers / stages * num_micro_batches * machine.fp8_layer_ms / 1000
        products = max(products, launched / (1 + flops.BACKWARD_FACTOR) - attention)
    head = flops.head_flops_per_token(architecture) * counts["num_response_tokens"] / rate
    again = {"none": 0.0, "selective": attention, "full": products + attention}[model.recompute_granularity]
    factor = flops.BACKWARD_FACTOR if grid.adapters is None else flops.FROZEN_BACKWARD_FACTOR
    backward = factor * (products + head) + flops.BACKWARD_FACTOR * attention
    return products + attention + head, backward, again + head


def _busiest_layers(architecture: Architecture, grid: Grid) -> tuple[int, int]:
    """Find the pipeline stage with the most products in its layers -> (with attention, FLOPs a token)."""
    kinds = {kind: flops.layer_flops_per_token(architecture, kind=kind) for kind in architecture.layer_kinds()}
    stages = [
        [architecture.kind(layer) for chunk in chunks for layer in chunk]
        for chunks in (
            grid.chunks_of_stage(architecture.num_layers, stage)
            for stage in range(grid.parallel.pipeline_model_parallel_size)
        )
    ]
    busiest = max(stages, key=lambda stage: sum(kinds[kind] for kind in stage))
    return sum(not kind.has_delta_net for kind in busiest), sum(kinds[kind] for kind in busiest)


def stage_seconds(architecture: Architecture, config: PlanConfig, grid: Grid, step: StepTime) -> dict[str, float]:
    """Estimate what an iteration computes -> {stage: seconds}; what it waits for files is `files.file_traffic`'s."""
    machine, given, work = config.machine, config.workload, workload(config)
    source, candidate = _PAIRRM_LIMITS
    pair_tokens = min(given.mean_prompt_tokens, source) + 2 * min(given.mean_response_tokens, candidate)
    num_pairs = given.num_prompts * given.num_responses * (given.num_responses - 1)
    judging = num_pairs * pair_tokens * 2 * _PAIRRM_BACKBONE / (machine.judge_tflops * _TERA * grid.world_size)
    factor = flops.BACKWARD_FACTOR if grid.adapters is None else flops.FROZEN_BACKWARD_FACTOR
    forward_share = 1 / (1 + factor)
    passes = 1 + max(
        len(config.reference), config.objective.row.num_references[0]
    )  # pi_t's, and the objective's others
    reference = passes * -(-work.num_rows // work.rows_per_step) * step.seconds * forward_share
    return {
        "rollouts": _rollout_seconds(architecture, config, grid),
        "judging (PairRM)": judging,
        "reference pass": reference,
        "training": work.num_steps * step.seconds,
    }


def _rollout_seconds(architecture: Architecture, config: PlanConfig, grid: Grid) -> float:
    """Time the sampling: a decoding step reads all weights and its answers' keys and values once -> seconds."""
    machine, given = config.machine, config.workload
    weights = 2 * num_parameters(architecture)
    size = 1
    while weights / size > _SAMPLER_SHARE * machine.gpu_memory_gb * 1e9 and size < machine.gpus_per_node:
        size *= 2
    samplers = max(1, grid.world_size // size)
    answers = given.num_prompts * given.num_responses
    together = min(machine.decode_sequences, max(1, answers // samplers))
    length = given.mean_prompt_tokens + given.mean_response_tokens / 2
    latent = architecture.latent_attention
    channels = 2 * architecture.key_channels if latent is None else latent.kv_down_channels
    cache = 2 * architecture.num_attention_layers * channels * length
    read = (weights + together * cache) / size / (machine.hbm_gb_per_s * 1e9 * machine.decode_efficiency)
    per_token = flops.all_layers_flops_per_token(architecture)
    computed = together * per_token / size / (machine.bf16_tflops * _TERA)
    decoding = answers * given.mean_response_tokens / samplers / together * max(read, computed)
    prompts = given.num_prompts * given.mean_prompt_tokens * per_token / (samplers * size * machine.bf16_tflops * _TERA)
    return decoding + prompts
