"""A plan as a page of text: one column for each world."""

from collections.abc import Callable
from functools import partial

from megatron_sppo.planning.plan import Plan, Report, is_for_engine

_WIDTH = 46
_COLUMN = 20


def render(report: Report) -> str:
    """Lay a report out -> text."""
    config, plans = report.config, report.plans
    model = config.model
    precision = model.params_dtype + ("" if model.fp8 == "none" else f", FP8 {model.fp8} {model.fp8_recipe}")
    spec = "Transformer Engine's layers (computed)" if is_for_engine(model) else "torch's layers"
    lines = [
        f"{report.model}: {report.num_parameters / 1e9:.3f} billion weights, {precision}, {spec}, "
        f"recomputation {model.recompute_granularity}",
        "",
        _row("GPUs", plans, lambda plan: str(plan.world_size)),
        _row("layout", plans, lambda plan: plan.layout),
        _row(f"fits in {config.machine.gpu_memory_gb:g} GB", plans, lambda plan: "yes" if plan.fits else "NO"),
        *_memory(plans),
        *_step(plans),
        *_iteration(plans),
        *_files(plans),
    ]
    for plan in plans:
        lines += ["", *(f"{plan.world_size} GPUs: {line}" for line in plan.advice)] if plan.advice else []
    machine, given = config.machine, config.workload
    lines += [
        "",
        f"Times rest on assumptions (--help says whence): products run at {machine.bf16_tflops:g} TFLOP/s in bfloat16",
        f"and {machine.fp8_tflops:g} in FP8, a GPU moves {machine.node_gb_per_s:g} GB/s within a node of "
        f"{machine.gpus_per_node} and {machine.network_gb_per_s:g} between nodes,",
        f"prompts have {given.mean_prompt_tokens:g} tokens and answers {given.mean_response_tokens:g}.",
        f"A thread hashes {machine.hash_gb_per_s:g} GB/s, writes {machine.thread_write_gb_per_s:g} and reads "
        f"{machine.thread_read_gb_per_s:g}; a node moves {machine.storage_gb_per_s:g} to and from files, all together "
        f"{machine.file_system_gb_per_s:g}.",
        "Memory is by formula: sequences of full length, routers in balance, "
        f"{machine.context_gib:g} GiB for CUDA and NCCL, {100 * machine.fragmentation:g} % of activations lost.",
    ]
    return "\n".join(lines)


def _row(name: str, plans: tuple[Plan, ...], value: Callable[[Plan], str]) -> str:
    return f"{name:<{_WIDTH}}" + "".join(f"{value(plan):>{_COLUMN}}" for plan in plans)


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}"


def _memory(plans: tuple[Plan, ...]) -> list[str]:
    rows: list[tuple[str, Callable[[Plan], str]]] = [
        ("fullest pipeline stage", lambda plan: f"{plan.fullest.stage} of {len(plan.stages)}"),
        ("weights of it, billions", lambda plan: f"{plan.fullest.num_parameters / 1e9:.3f}"),
        ("  weights, GB", lambda plan: _gigabytes(plan.fullest.weights)),
        ("  adapters", lambda plan: _gigabytes(plan.fullest.adapters)),
        ("  gradients, float32", lambda plan: _gigabytes(plan.fullest.gradients)),
        ("  optimizer", lambda plan: _gigabytes(plan.fullest.optimizer)),
        ("  FP8 copies of weights", lambda plan: _gigabytes(plan.fullest.fp8_weights)),
        ("  activations in flight", lambda plan: _gigabytes(plan.fullest.activations)),
        ("  working space", lambda plan: _gigabytes(plan.fullest.working)),
        ("  context, buffers, fragmentation", lambda plan: _gigabytes(plan.fullest.allowance)),
        ("  together", lambda plan: _gigabytes(plan.fullest.total)),
        (
            "together by stage",
            lambda plan: " ".join(f"{stage.total / 1e9:.0f}" for stage in plan.stages)[: _COLUMN - 1],
        ),
    ]
    if not any(plan.fullest.adapters for plan in plans):
        rows = [row for row in rows if row[0] != "  adapters"]
    return ["", "memory of a rank", *(_row(name, plans, value) for name, value in rows)]


def _step(plans: tuple[Plan, ...]) -> list[str]:
    axes = list(dict.fromkeys(line.axis for plan in plans for line in plan.step.traffic))
    rows: list[tuple[str, Callable[[Plan], str]]] = [
        ("tokens of a largest micro-batch", lambda plan: str(plan.shape.num_tokens)),
        ("micro-batches of a rank", lambda plan: str(plan.step.num_micro_batches)),
        ("tokens", lambda plan: f"{plan.step.num_tokens:.0f}"),
        ("model PFLOP", lambda plan: f"{plan.step.model_flops / 1e15:.1f}"),
        ("model TFLOP a token", lambda plan: f"{plan.step.model_flops / plan.step.num_tokens / 1e12:.4f}"),
        ("computation, s", lambda plan: f"{plan.step.compute_seconds:.2f}"),
        ("pipeline bubble, %", lambda plan: f"{100 * plan.step.bubble_fraction:.1f}"),
    ]
    lines = ["", "an optimizer step", *(_row(name, plans, value) for name, value in rows)]
    lines += [_row(f"traffic {axis}, GB a GPU (s)", plans, partial(_traffic, axis=axis)) for axis in axes]
    last: list[tuple[str, Callable[[Plan], str]]] = [
        ("step, s", lambda plan: f"{plan.step.seconds:.2f}"),
        ("tokens/s a GPU", lambda plan: f"{plan.step.tokens_per_gpu(plan.world_size):.0f}"),
        ("model TFLOP/s a GPU", lambda plan: f"{plan.step.tflops_per_gpu(plan.world_size):.0f}"),
    ]
    return [*lines, *(_row(name, plans, value) for name, value in last)]


def _minutes(plan: Plan, stage: str) -> str:
    return f"{plan.seconds[stage] / 60:.1f}"


def _traffic(plan: Plan, axis: str) -> str:
    for line in plan.step.traffic:
        if line.axis == axis:
            return f"{line.num_bytes / 1e9:.2f} ({line.seconds:.2f})"
    return "-"


def _iteration(plans: tuple[Plan, ...]) -> list[str]:
    stages = list(dict.fromkeys(stage for plan in plans for stage in plan.seconds))
    lines = ["", "an iteration, minutes", _row("steps", plans, lambda plan: str(plan.num_steps))]
    lines += [_row(f"  {stage}", plans, partial(_minutes, stage=stage)) for stage in stages]
    return [*lines, _row("  together", plans, lambda plan: f"{sum(plan.seconds.values()) / 60:.1f}")]


def _files(plans: tuple[Plan, ...]) -> list[str]:
    """Lay out what an iteration moves to and from files, a row each way; bytes are of all processes together."""
    names = [passage.what for passage in plans[0].files.passages]
    lines = [
        "",
        "files of a model in an iteration, GB read / hashed / written",
        _row("  a checkpoint", plans, lambda plan: _gigabytes(plan.files.checkpoint_bytes)),
        _row("  of it the busiest rank's", plans, lambda plan: _gigabytes(plan.files.rank_bytes)),
    ]
    lines += [_row(f"  {name}", plans, partial(_passage, number=number)) for number, name in enumerate(names)]
    lines += [
        _row("  saving behind steps, minutes", plans, lambda plan: f"{plan.files.passages[0].hidden_seconds / 60:.1f}"),
        _row("  disk of the run at its fullest", plans, lambda plan: _gigabytes(plan.files.peak_disk_bytes)),
    ]
    return lines


def _passage(plan: Plan, number: int) -> str:
    passage = plan.files.passages[number]
    moved = (passage.read_bytes, passage.hashed_bytes, passage.written_bytes)
    return " / ".join(f"{num_bytes / 1e9:.0f}" for num_bytes in moved)
