"""The stages of a run as commands that a person could type, in their order."""

import itertools
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, read_config
from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.config import to_flags
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.config import EvaluateConfig, ScoreConfig
from megatron_sppo.judge.load import MODEL_KINDS, judge_place, load_judge
from megatron_sppo.judge.model_files import refuse_missing_directory
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.selfplay.config import LAUNCHERS, SelfPlayConfig
from megatron_sppo.selfplay.paths import RunPaths
from megatron_sppo.selfplay.stages import Stage
from megatron_sppo.training.config import InspectionConfig, TrainingConfig
from megatron_sppo.training.layout import check_layout

_OURS = (sys.executable, "-m", "megatron_sppo")

_EVALUATION_SEED = 1_000_003
"""Added to the run's seed: held-out answers are never sampled with a training rollout's seed."""


def start_stages(config: SelfPlayConfig, paths: RunPaths, *, evaluates: bool) -> Iterator[Stage]:
    """List what comes before the first iteration -> stages."""
    model = config.run.model
    yield Stage(
        name="import",
        command=_command(config, "convert", "import", "--hf", str(model), "--megatron", str(paths.base)),
        inputs=(model,),
        outputs=(paths.base,),
    )
    if evaluates:
        yield _heldout_rollouts(config, paths, 0, name="base-eval-rollouts")


def iteration_stages(config: SelfPlayConfig, paths: RunPaths, iteration: int, *, evaluates: bool) -> Iterator[Stage]:
    """List the stages of iteration 1, 2, ... -> stages."""
    prefix = f"iter_{iteration}"
    rollouts, dataset = paths.of(iteration, "rollouts"), paths.of(iteration, "dataset")
    checkpoint, sampled_from = paths.of(iteration, "checkpoint"), paths.policy(config, iteration - 1)
    yield Stage(
        name=f"{prefix}-rollouts",
        command=_rollout_command(
            config,
            model=sampled_from[0],
            adapter=paths.adapter(config, iteration - 1),
            prompts=paths.prompts(iteration),
            output=rollouts,
            num_responses=config.rollout.num_responses,
            seed=config.run.seed + iteration,
            allow_no_signal=config.scoring.allow_no_signal,
        ),
        inputs=(*sampled_from, paths.prompts(iteration)),
        outputs=(rollouts,),
    )
    yield Stage(
        name=f"{prefix}-dataset",
        command=_command(config, "score", *_flags(_scoring(config, rollouts, dataset))),
        inputs=(rollouts,),
        outputs=(dataset,),
    )
    yield from _training_stages(config, paths, iteration)
    if config.evaluation.inspected_prompts:
        yield Stage(
            name=f"{prefix}-inspect",
            command=_command(config, "inspect", *_flags(_inspection(config, paths, iteration))),
            inputs=(checkpoint, paths.megatron(config, iteration - 1), dataset),
            outputs=(paths.token_log_ratios(iteration),),
        )
    yield from _export_stages(config, paths, iteration)
    if evaluates:
        yield _heldout_rollouts(config, paths, iteration, name=f"{prefix}-eval-rollouts")
        yield _evaluation(config, paths, iteration)


def _export_stages(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> Iterator[Stage]:
    """List what makes of a trained checkpoint what samplers take, and training where it is merged -> stages."""
    prefix, checkpoint, export = f"iter_{iteration}", paths.checkpoint(iteration), paths.export(config, iteration)
    base = paths.hugging_face(config, iteration - 1)
    inputs: tuple[Path, ...] = (checkpoint,)
    written: tuple[str, ...] = ("--hf", str(export), "--template", str(config.run.model))
    if config.swaps_adapters:
        written = ("--adapter", str(export), "--base", str(base))
    elif config.run.lora_merge_each_iteration:
        written, inputs = ("--hf", str(export), "--merge", "--base", str(base)), (checkpoint, base)
    yield Stage(
        name=f"{prefix}-export",
        command=_command(config, "convert", "export", "--megatron", str(checkpoint), *written),
        inputs=inputs,
        outputs=(export,),
    )
    if config.run.lora_merge_each_iteration:
        merged = paths.megatron(config, iteration)
        yield Stage(
            name=f"{prefix}-import",
            command=_command(config, "convert", "import", "--hf", str(export), "--megatron", str(merged)),
            inputs=(export,),
            outputs=(merged,),
        )


def _start(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> tuple[Path, Path | None]:
    """Choose what the policy after an iteration is to training -> (checkpoint to --load, that of --load-adapter)."""
    if config.swaps_adapters and iteration > 0:
        return paths.base, paths.checkpoint(iteration)
    return paths.megatron(config, iteration), None


def _training_stages(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> Iterator[Stage]:
    """List what trains the policy of an iteration, with onpo its auxiliary policy before it -> stages.

    Both of onpo's start from pi_t on the same data: the auxiliary takes its step from the auxiliary before it, and
    pi_{t+1} takes the same step from the new one (Zhang et al. 2025, arXiv:2502.16852, algorithm 1).
    """
    objective = config.training.objective
    load, load_adapter = _start(config, paths, iteration - 1)
    trained = [("train", paths.of(iteration, "checkpoint"), _references(config, paths, iteration))]
    if objective.objective == "onpo":
        trained.insert(0, ("train-auxiliary", paths.auxiliary(iteration), (paths.auxiliary(iteration - 1),)))
    for name, save, references in trained:
        weights = objective.reference_weights
        if objective.objective == "mnpo":
            weights = weights[: len(references)]
        start = (load,) if load_adapter is None else (load, load_adapter)
        settings = replace(
            config.training,
            objective=replace(objective, reference_weights=weights),
            adapters=replace(config.training.adapters, load_adapter=load_adapter),
            load=load,
            data=paths.of(iteration, "dataset"),
            save=save,
            reference=references,
            run=replace(config.training.run, tracking=config.tracking_of(f"iter_{iteration}-{name}")),
        )
        settings.objective.row.mixture_weights(len(references))  # refuses what does not fit, before the first stage
        yield Stage(
            name=f"iter_{iteration}-{name}",
            command=_command(config, "train", *_flags(settings)),
            inputs=(*start, paths.of(iteration, "dataset"), *references),
            outputs=(save,),
        )


def _references(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> tuple[Path, ...]:
    """Choose the policies that the objective looks at beside pi_t -> checkpoints, the newest first."""
    name = config.training.objective.objective
    if name == "onpo":
        return (paths.auxiliary(iteration),)
    if name == "mnpo":
        newest = iteration - 2
        past = range(newest, -1, -1)[: config.run.past_policies]
        return tuple(paths.megatron(config, number) for number in past)
    return (paths.base,) if name in ("inpo", "nash_md", "rspo") else ()


def report_command(run_dir: Path) -> tuple[str, ...]:
    """Spell the command that writes report.html -> tokens."""
    return (*_OURS, "report", "--run", str(run_dir))


def check_stages(config: SelfPlayConfig) -> None:
    """Refuse before the first stage what a later one would refuse; what lies on a hub is not asked for.

    Raises:
        ConfigError: the stage's own, or a judge that does not exist.
    """
    paths = RunPaths(run_dir=config.run.output)
    for _ in itertools.chain(
        start_stages(config, paths, evaluates=True), iteration_stages(config, paths, 1, evaluates=True)
    ):
        pass  # each has its settings checked when its command is spelled
    _check_layout(config)
    for spec in {config.scoring.judge, config.eval_judge}:
        kind, _, place = spec.partition(":")
        if kind == "matrices":
            raise ConfigError(
                f"{spec} is a file of preferences between answers that exist: it cannot judge new ones. "
                "Use --judge pairrm:HUB_ID_OR_DIR or another judge that reads."
            )
        if kind in MODEL_KINDS:
            refuse_missing_directory(place, spec=kind)
        elif kind != "endpoint":
            load_judge(spec, preset=config.scoring.preset)


def judge_files(config: SelfPlayConfig) -> list[Path]:
    """List the judges that are files or directories of this machine -> paths."""
    places = dict.fromkeys(judge_place(spec) for spec in (config.scoring.judge, config.eval_judge))
    return [place for place in places if place is not None]


def _check_layout(config: SelfPlayConfig) -> None:
    """Refuse ranks that do not divide the model or the batch, where training is started here and they are known."""
    if config.run.training_launcher:
        return
    ranks, training = config.run.training_processes, config.training
    place = config.run.model / CONFIG_FILE
    architecture = architecture_from_hf(read_config(config.run.model), place=str(place))
    check_layout(training.parallel, architecture, world_size=ranks)
    training.check_batch(data_parallel_size=ranks // training.parallel.model_parallel_size)


def _heldout_rollouts(config: SelfPlayConfig, paths: RunPaths, iteration: int, *, name: str) -> Stage:
    policy, output = paths.policy(config, iteration), paths.heldout_rollouts(iteration)
    return Stage(
        name=name,
        command=_rollout_command(
            config,
            model=policy[0],
            adapter=paths.adapter(config, iteration),
            prompts=paths.heldout,
            output=output,
            num_responses=config.eval_num_responses,
            seed=config.run.seed + _EVALUATION_SEED,
            allow_no_signal=True,  # a policy that always answers the same can still be judged against another
        ),
        inputs=(*policy, paths.heldout),
        outputs=(output,),
    )


def _rollout_command(config: SelfPlayConfig, *, allow_no_signal: bool, **job: Any) -> tuple[str, ...]:
    """Spell a rollout stage -> tokens.

    Args:
        job: GenerateConfig's model, adapter, prompts, output, num_responses and seed.
    """
    section, own = config.rollout, config.run.rollout_command
    options = section.rollout_options
    settings = replace(
        options,
        **job,
        max_tokens=section.max_tokens,
        temperature=_sampled(options, section.temperature, options.temperature),
        top_p=_sampled(options, section.top_p, options.top_p),
        # A command of the user's own promises no such flag.
        allow_no_signal=options.allow_no_signal or (allow_no_signal and not own),
        engine=replace(
            options.engine,
            tensor_parallel_size=_given(options.engine.tensor_parallel_size, section.rollout_tensor_parallel_size),
            **_room_for_adapters(config),
        ),
        servers=config.servers,
        # Servers are a pool of their own; a command of the user's promises none.
        pool=options.pool if own or config.servers.server else config.rollout_pool,
    )
    return (*shlex.split(own), *_flags(settings)) if own else _command(config, "rollouts", *_flags(settings))


def _sampled(options: GenerateConfig, setting: float, option: float | None) -> float | None:
    """Choose how answers are drawn: by an option, by a preset among the options, or by the section's setting."""
    chosen_preset = options.preset != GenerateConfig.preset
    return None if option is None and chosen_preset else setting if option is None else option


def _room_for_adapters(config: SelfPlayConfig) -> dict[str, Any]:
    """Choose what an engine of ours has room for from the first stage on -> settings of EngineConfig."""
    adapters, own = config.training.adapters, config.rollout.rollout_options.engine
    if not config.swaps_adapters or config.servers.server or own.max_lora_rank is not None:
        return {}
    return {"max_lora_rank": adapters.lora_rank, "lora_target_modules": adapters.lora_targets}


def _scoring(config: SelfPlayConfig, rollouts: Path, dataset: Path) -> ScoreConfig:
    section, options = config.scoring, config.scoring.scoring_options
    return replace(
        options,
        rollouts=rollouts,
        output=dataset,
        judge=section.judge,
        preset=options.preset or section.preset,
        selection=options.selection or section.selection,
        judge_after=options.judge_after or section.judge_after,
        verdict_tokens=_given(options.verdict_tokens, section.verdict_tokens),
        allow_no_signal=options.allow_no_signal or section.allow_no_signal,
        pool=_pool(config, options.pool),
    )


def _pool(config: SelfPlayConfig, option: PoolConfig) -> PoolConfig:
    """Choose a stage's own pool where it has one, and the run's otherwise -> PoolConfig."""
    if option == PoolConfig(worker_timeout=option.worker_timeout):
        own = option.worker_timeout != PoolConfig().worker_timeout
        return replace(config.run.pool, worker_timeout=option.worker_timeout) if own else config.run.pool
    return option


def _given(option: int, setting: int) -> int:
    """Choose an option where it is not its default, 1, and the section's setting otherwise -> int."""
    return setting if option == 1 else option


def _inspection(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> InspectionConfig:
    training = {section.name: getattr(config.training, section.name) for section in fields(TrainingConfig)}
    adapters, checkpoint = config.training.adapters, paths.checkpoint(iteration)
    load, load_adapter = checkpoint, None
    if adapters.lora_rank is not None:  # the checkpoint lies on what its training was given
        load, load_adapter = _start(config, paths, iteration - 1)[0], checkpoint
    return InspectionConfig(
        **training
        | {
            "load": load,
            "adapters": replace(adapters, load_adapter=load_adapter),
            "reference": (paths.megatron(config, iteration - 1),),
            "data": paths.of(iteration, "dataset"),
            "save": Path(),
            "output": paths.token_log_ratios(iteration),
            "num_prompts": config.evaluation.inspected_prompts,
        }
    )


def _evaluation(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> Stage:
    policy, base, previous = (paths.heldout_rollouts(number) for number in (iteration, 0, iteration - 1))
    of_training = _scoring(config, paths.of(iteration, "rollouts"), paths.of(iteration, "dataset"))
    settings = EvaluateConfig(
        policy=policy,
        base=base,
        previous=previous,
        judge=config.eval_judge,
        preset=of_training.preset or config.scoring.preset,
        judge_after=of_training.judge_after,
        verdict_tokens=of_training.verdict_tokens,
        scorer_seconds=of_training.scorer_seconds,
        allow_no_signal=of_training.allow_no_signal,
        output=paths.result(iteration),
        seed=config.run.seed,
        bootstrap_resamples=config.evaluation.bootstrap_resamples,
        pool=of_training.pool,
    )
    return Stage(
        name=f"iter_{iteration}-eval",
        command=_command(config, "evaluate", *_flags(settings)),
        inputs=(policy, base, previous),
        outputs=(paths.result(iteration),),
    )


def _command(config: SelfPlayConfig, name: str, *words: str) -> tuple[str, ...]:
    """Spell a command of this package as its launcher starts it -> tokens."""
    processes = config.run.training_processes
    if launcher := config.run.launcher_of(name):
        return (*launcher, *_OURS[1:], name, *words)
    if processes > 1 and name in LAUNCHERS["training_launcher"]:
        torchrun = ("-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        return (_OURS[0], *torchrun, *_OURS[1:], name, *words)
    return (*_OURS, name, *words)


def _flags(settings: Any) -> Iterator[str]:
    """Spell a stage's settings as a person would -> tokens, `--model DIR` rather than `--model=DIR`."""
    for token in to_flags(settings):
        flag, equals, value = token.partition("=")
        is_plain = flag.startswith("--") and equals and value and not value.startswith("-")
        yield from (flag, value) if is_plain else (token,)
