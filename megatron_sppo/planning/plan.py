"""The plan of a run in a world of some size: memory by pipeline stage, time by stage of an iteration, and advice."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.model.config import ModelConfig, check_divisibility, token_multiple
from megatron_sppo.planning.activations import MicroBatchShape
from megatron_sppo.planning.architectures import find_architecture
from megatron_sppo.planning.config import PlanConfig
from megatron_sppo.planning.files import FileTraffic, file_traffic
from megatron_sppo.planning.memory import StageMemory, stage_memory
from megatron_sppo.planning.parameters import Grid
from megatron_sppo.planning.timing import StepTime, stage_seconds, step_time, workload
from megatron_sppo.training.layout import check_layout
from megatron_sppo.weight_counts import num_parameters

_BUBBLE_WORTH_A_WORD = 0.2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One world."""

    world_size: int
    layout: str
    shape: MicroBatchShape
    """The largest micro-batch."""
    stages: tuple[StageMemory, ...]
    """Memory of a rank, by pipeline stage."""
    fits: bool
    step: StepTime
    num_steps: int
    seconds: dict[str, float]
    """Of an iteration, by stage."""
    files: FileTraffic
    advice: tuple[str, ...]

    @property
    def fullest(self) -> StageMemory:
        """The pipeline stage that holds the most."""
        return max(self.stages, key=lambda stage: stage.total)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All worlds that were asked for."""

    model: str
    architecture: Architecture
    num_parameters: int
    config: PlanConfig
    plans: tuple[Plan, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints; bytes, seconds and FLOPs. Assumptions are under `machine`."""
        return {
            "model": self.model,
            "num_parameters": self.num_parameters,
            "architecture": dataclasses.asdict(self.architecture),
            "assumptions": dataclasses.asdict(self.config.machine),
            "workload": dataclasses.asdict(self.config.workload),
            "plans": [_plan_json(plan) for plan in self.plans],
        }


def make_report(config: PlanConfig, *, config_file: Path | None) -> Report:
    """Plan every world size that is asked for -> Report.

    Raises:
        ConfigError: no model is named, or the layout does not divide model, world or batch: what training would refuse.
    """
    model, architecture = find_architecture(config.plan.model, config_file=config_file)
    sizes = config.plan.world_size or (config.parallel.model_parallel_size,)
    return Report(
        model=model,
        architecture=architecture,
        num_parameters=num_parameters(architecture),
        config=config,
        plans=tuple(make_plan(architecture, config, world_size=size) for size in sizes),
    )


def make_plan(architecture: Architecture, config: PlanConfig, *, world_size: int) -> Plan:
    """Plan one world -> Plan."""
    check_layout(config.parallel, architecture, world_size=world_size)
    check_divisibility(
        config.model,
        architecture,
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_parallel_size,
    )
    adapters = config.adapters.settings(architecture)
    grid = Grid(parallel=config.parallel, world_size=world_size, adapters=adapters)
    config.check_batch(data_parallel_size=grid.data_parallel_size)
    shape = largest_micro_batch(config, grid, architecture)
    step = step_time(architecture, config, grid)
    stages = tuple(
        stage_memory(
            architecture,
            config.model,
            grid,
            shape,
            stage=stage,
            num_micro_batches=step.num_micro_batches,
            optimizer=config.optimization.optimizer,
            engine=is_for_engine(config.model),
            machine=config.machine,
        )
        for stage in range(config.parallel.pipeline_model_parallel_size)
    )
    num_steps = workload(config).num_steps
    files = file_traffic(architecture, config, grid, num_steps=num_steps, step_seconds=step.seconds)
    seconds = stage_seconds(architecture, config, grid, step) | files.waited_seconds
    fits = max(stage.total for stage in stages) <= config.machine.gpu_memory_gb * 1e9
    return Plan(
        world_size=world_size,
        layout=layout_name(grid),
        shape=shape,
        stages=stages,
        fits=fits,
        step=step,
        num_steps=num_steps,
        seconds=seconds,
        files=files,
        advice=tuple(_advice(config, grid, stages, step, seconds, fits=fits)),
    )


def is_for_engine(model: ModelConfig) -> bool:
    """Tell whether the plan is of Transformer Engine's spec: `auto` is, as it will be where there is a GPU."""
    return model.transformer_impl != "torch"


def largest_micro_batch(config: PlanConfig, grid: Grid, architecture: Architecture) -> MicroBatchShape:
    """Take every sequence as long as is let through, and all of it as response -> MicroBatchShape.

    Where prompts are shared all are behind one, which is half of each sequence.
    """
    batch, parallel = config.batch, config.parallel
    context = parallel.context_parallel_size
    length = batch.seq_length or architecture.max_position_embeddings
    tokens = config.batch.packed_sequence_size or batch.micro_batch_size * length
    multiple = token_multiple(
        config.model,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )
    multiple *= context * (2 if context > 1 else 1)
    tokens = -(-tokens // multiple) * multiple
    return MicroBatchShape(
        num_tokens=tokens // context,
        num_response_tokens=tokens // context,
        sum_of_squares=tokens * length,
        num_path_keys=2 * tokens if batch.share_prompts else 0,
    )


def layout_name(grid: Grid) -> str:
    """Spell a layout -> such as "TP8 SP PP4 DP2"."""
    parallel = grid.parallel
    parts = [f"TP{parallel.tensor_model_parallel_size}"]
    if parallel.sequence_parallel:
        parts.append("SP")
    for name, size in (
        ("PP", parallel.pipeline_model_parallel_size),
        ("VPP", grid.num_chunks),
        ("CP", parallel.context_parallel_size),
        ("EP", parallel.expert_model_parallel_size),
    ):
        if size > 1:
            parts.append(f"{name}{size}")
    return " ".join([*parts, f"DP{grid.data_parallel_size}"])


def _advice(
    config: PlanConfig,
    grid: Grid,
    stages: tuple[StageMemory, ...],
    step: StepTime,
    seconds: dict[str, float],
    *,
    fits: bool,
) -> list[str]:
    """Say what a person who reads the numbers would -> lines."""
    lines = []
    fullest = max(stages, key=lambda stage: stage.total)
    if not fits:
        lines.append(
            f"stage {fullest.stage} needs {fullest.total / 1e9:.1f} GB of {config.machine.gpu_memory_gb:g}. "
            + _remedy(config, grid, fullest)
        )
    if step.bubble_fraction > _BUBBLE_WORTH_A_WORD:
        lines.append(
            f"stages idle {100 * step.bubble_fraction:.0f} % of a step: {step.num_micro_batches} micro-batches fill "
            f"{grid.parallel.pipeline_model_parallel_size} stages badly. Use fewer stages or data-parallel ranks, a "
            "larger global batch or --virtual-pipeline-model-parallel-size 2."
        )
    waiting = step.seconds - step.compute_seconds / (1 - step.bubble_fraction)
    if waiting > step.seconds / 3:
        worst = max(step.traffic, key=lambda line: line.seconds)
        lines.append(
            f"the step waits for traffic, most of it {worst.axis}: {worst.seconds:.2f} of {step.seconds:.2f} s."
        )
    saving, training = seconds["saving checkpoints"], seconds["training"]
    if saving > training / 2:
        lines.append(
            f"steps wait {saving / 60:.0f} minutes for saves beside {training / 60:.0f} of training. "
            f"Use {'' if config.run.async_save else '--async-save or '}a larger --save-interval."
        )
    return lines


def _remedy(config: PlanConfig, grid: Grid, fullest: StageMemory) -> str:
    if fullest.optimizer > fullest.activations:
        if not config.parallel.use_distributed_optimizer and grid.optimizer_ranks > 1:
            return "Use --use-distributed-optimizer."
        return "Use more data-parallel ranks with --use-distributed-optimizer, or more model-parallel ones."
    if config.model.recompute_granularity != "full":
        return "Use --recompute-granularity full, or a smaller micro-batch."
    return "Use a smaller micro-batch, or more model-parallel ranks."


def _plan_json(plan: Plan) -> dict[str, Any]:
    step = plan.step
    return {
        "world_size": plan.world_size,
        "layout": plan.layout,
        "largest_micro_batch": dataclasses.asdict(plan.shape),
        "fits": plan.fits,
        "memory_bytes": [
            dataclasses.asdict(stage) | {"resident": stage.resident, "total": stage.total} for stage in plan.stages
        ],
        "step": dataclasses.asdict(step)
        | {
            "tokens_per_second_per_gpu": step.tokens_per_gpu(plan.world_size),
            "model_tflops_per_gpu": step.tflops_per_gpu(plan.world_size),
        },
        "num_steps": plan.num_steps,
        "iteration_seconds": plan.seconds,
        "files": dataclasses.asdict(plan.files),
        "advice": list(plan.advice),
    }
