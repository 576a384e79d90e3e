"""What `--keep-last` removes of older iterations: weights and optimizer, which no later stage reads."""

from megatron_sppo.selfplay.commands import iteration_stages
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.selfplay.paths import RunPaths
from megatron_sppo.selfplay.stages import StageMachine

_ITERATIONS = "iter_*"
"""What goes of a training root: its checkpoints. Metrics and what each answer got stay, for the report."""


def retire_iterations(config: SelfPlayConfig, machine: StageMachine, paths: RunPaths, *, finished: int) -> None:
    """Remove checkpoints and Hugging Face exports of all but the last `run.keep_last` iterations up to `finished`.

    The next iteration starts from the checkpoint and the export of `finished`; report and evaluation read rollouts,
    datasets, metrics and results, which stay, as does the start model in `base`. Nothing is removed while an output of
    iteration `finished` is missing or changed, nor of an iteration whose own outputs are.
    """
    if config.run.keep_last is None:
        return
    for iteration in range(1, finished - config.run.keep_last + 1):
        if not all(_is_whole(config, machine, paths, number) for number in (finished, iteration)):
            continue
        export = paths.export(config, iteration)
        roots = {paths.checkpoint(iteration), paths.megatron(config, iteration), paths.auxiliary(iteration)}
        for root in sorted(roots):
            machine.retire(root, parts=tuple(root.glob(_ITERATIONS)))
        machine.retire(export, parts=(export,))


def _is_whole(config: SelfPlayConfig, machine: StageMachine, paths: RunPaths, iteration: int) -> bool:
    return all(machine.is_done(stage) for stage in iteration_stages(config, paths, iteration, evaluates=False))
