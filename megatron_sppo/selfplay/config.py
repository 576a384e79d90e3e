"""Settings of a self-play run: one YAML file, sections `run`, `rollout`, `scoring`, `training`, `evaluation`.

The everyday settings of the stages are flags of their own; `rollout_options`, `scoring_options` and `training` are the
stages' real configs, without what self-play decides.
"""

import shlex
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sppo import config as config_files
from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.config import LAYOUT, NonNegativeInt, PositiveInt, Seed, SettingsOf, check_ranges, flag_of
from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.config import ScoreConfig
from megatron_sppo.rollout.config import MAX_LORA_RANK, GenerateConfig, ServerConfig, Temperature, TopP
from megatron_sppo.tracking.config import OFFLINE_NAME, TrackingConfig
from megatron_sppo.training.config import TrainingConfig

MIN_RESAMPLES = 2000

_NOWHERE = Path("decided-by-self-play")
_OF_ROLLOUTS: dict[str, Any] = {"model": _NOWHERE, "prompts": _NOWHERE, "output": _NOWHERE, "seed": 0}
_OF_ROLLOUTS |= {"num_responses": 2, "max_tokens": 1, "adapter": None}
_OF_SCORING: dict[str, Any] = {"rollouts": _NOWHERE, "output": _NOWHERE, "from_dataset": None, "judge": "pairrm:"}
_OF_TRAINING: dict[str, Any] = {"load": _NOWHERE, "data": _NOWHERE, "save": _NOWHERE, "reference": ()}
"""What self-play decides of each stage, with stand-ins."""


LAUNCHERS = {
    "rollout_launcher": ("rollouts",),
    "scoring_launcher": ("score", "evaluate"),
    "inspection_launcher": ("inspect",),
    "training_launcher": ("train", "inspect"),
    "conversion_launcher": ("convert",),
}
"""Settings of RunConfig -> the commands that they start; of two that start the same the first that is set does."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is aligned, from what, and for how long."""

    model: Annotated[Path, LAYOUT]
    """Hugging Face directory of the start model: pi_1, and the base of the evaluation."""
    prompts: Annotated[tuple[Path, ...], LAYOUT]
    """Prompts: a file (JSONL, Parquet, ...), a dataset directory or hub:NAME[:SUBSET][@SPLIT]. Several of them are one
    for each iteration, such as the thirds of UltraFeedback that SPPO's authors publish. Held-out rows are for the
    evaluation only."""
    output: Annotated[Path, LAYOUT]
    """Run directory. The same command again resumes it."""
    iterations: PositiveInt = 3
    """Rounds of rollouts, scoring and training."""
    prompts_per_iteration: Literal["disjoint", "all"] = "disjoint"
    """disjoint: each iteration trains on its own part of the prompts (paper: thirds), or on its own --prompts where
    there are several. all: on all of them."""
    max_prompts_per_iteration: PositiveInt | None = None
    """Most prompts of one iteration; the rest of its part is not used. None: all of them."""
    train_split: str | None = None
    """`split` of the prompts to train on. None: every row that is not held out."""
    heldout_split: str = "heldout"
    """`split` of the prompts for the evaluation."""
    seed: Seed = 0
    """Decides the order of the prompts, the rollouts' seeds and the bootstrap. Training has its own `seed`."""
    past_policies: PositiveInt = 2
    """Earlier policies that objective mnpo mixes with pi_t: those of so many iterations before it, as far as there are
    any. Of no effect with other objectives."""
    keep_last: Annotated[PositiveInt | None, LAYOUT] = None
    """Iterations whose checkpoints and Hugging Face exports are kept, the newest ones; older ones are removed when an
    iteration has ended. Start model, rollouts, datasets and results stay. None: all are kept. How many checkpoints each
    iteration keeps is training's own setting: `training: {keep_last: 1}`."""
    lora_merge_each_iteration: bool = False
    """Of runs with `training: {lora_rank: R}`: add each iteration's adapter to the model, from which the next one
    starts with a new adapter. Otherwise iterations go on with one adapter, on the start model."""
    keep_engine: Annotated[bool, LAYOUT] = True
    """Of runs with `training: {lora_rank: R}`, where iterations go on with one adapter: one vLLM engine of this machine
    samples for all of them; adapters are changed in it, and while others work it gives its GPUs' memory back. Off: it
    is started anew for each stage. Without effect with servers, `workers`, `ray` or a rollout_launcher."""
    training_processes: Annotated[PositiveInt, LAYOUT] = 1
    """Ranks of the training stage on this machine; above 1 it is started by torchrun."""
    training_launcher: Annotated[str | None, LAYOUT] = None
    """Command that starts training in place of python or torchrun, such as "srun torchrun --nnodes 4 ...". It is called
    with -m megatron_sppo train and training's flags, and must hand SIGTERM on: srun kills its tasks instead,
    examples/slurm/step.sh does not."""
    inspection_launcher: Annotated[str | None, LAYOUT] = None
    """The same for -m megatron_sppo inspect, which runs on training's ranks. None: as training is started."""
    rollout_launcher: Annotated[str | None, LAYOUT] = None
    """Command that starts rollouts in python's place, such as "srun ray symmetric-run ... -- python". It is called with
    -m megatron_sppo rollouts and its flags; what those are on a cluster say rollout_options, such as {ray: auto}."""
    scoring_launcher: Annotated[str | None, LAYOUT] = None
    """The same for -m megatron_sppo score, and for evaluate, which needs the same judges."""
    conversion_launcher: Annotated[str | None, LAYOUT] = None
    """The same for -m megatron_sppo convert, one process: for a node with memory and a fast disk."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    rollout_command: Annotated[str | None, LAYOUT] = None
    """Command in place of `megatron-sppo rollouts`: the seam for a sampler of your own. It is called with
    --model, --prompts, --output, --num-responses, --max-tokens, --temperature, --top-p and --seed, and writes rollouts
    as megatron_sppo/rollout/records.py describes them."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.prompts:
            raise ConfigError("prompts names no file. Use --prompts FILE or --prompts hub:NAME.")
        if 1 < len(self.prompts) < self.iterations and self.prompts_per_iteration == "disjoint":
            raise ConfigError(
                f"{len(self.prompts)} prompts are given, each for an iteration of its own, and {self.iterations} "
                f"iterations. Use --iterations {len(self.prompts)}, one --prompts, or --prompts-per-iteration all."
            )
        for name in ("rollout_command", *LAUNCHERS):
            _check_command(name, getattr(self, name))
        if self.rollout_command and self.rollout_launcher:
            raise ConfigError(
                "rollout_command and rollout_launcher are both set, and a command of your own is called as it is. "
                "Leave --rollout-launcher out, or put what it says into --rollout-command."
            )

    def launcher_of(self, command: str) -> list[str]:
        """Find what starts a command of this package in python's place -> tokens, empty: python itself does."""
        given = (getattr(self, name) for name, commands in LAUNCHERS.items() if command in commands)
        return shlex.split(next((text for text in given if text), ""))


def _check_command(name: str, text: str | None) -> None:
    """Refuse a command that a shell could not read.

    Raises:
        ConfigError: it is empty, or a quote is left open.
    """
    try:
        if text is None or shlex.split(text):
            return
        reason = "holds no command"
    except ValueError as error:
        reason = f"cannot be taken apart as a shell does ({error})"
    raise ConfigError(f"{name} is {text!r}, which {reason}. Write {flag_of(name)} 'PROGRAM ARGUMENT ...'.")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are sampled, in training and in evaluation alike."""

    num_responses: PositiveInt = 5
    """K answers a prompt."""
    max_tokens: PositiveInt = 1024
    """Longest answer, in tokens."""
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    rollout_tensor_parallel_size: Annotated[PositiveInt, LAYOUT] = 1
    """GPUs that share one sampler."""
    server: Annotated[tuple[str, ...], LAYOUT] = ()
    """URLs of running vLLM servers. They are given each iteration's weights, for which they must have been started with
    VLLM_SERVER_DEV_MODE=1."""
    rollout_options: Annotated[
        GenerateConfig, SettingsOf(GenerateConfig, name="rollout_options", decided=_OF_ROLLOUTS, by="self-play")
    ] = field(default_factory=lambda: GenerateConfig(**_OF_ROLLOUTS))
    """Further settings of `megatron-sppo rollouts`, NAME=VALUE (in YAML a mapping). They win over the ones above."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.num_responses < 2:
            raise ConfigError(
                f"num_responses is {self.num_responses}; preferences need at least 2. Use --num-responses 5."
            )


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Who prefers what, and which answers are trained on."""

    judge: str
    """pairrm:HUB_ID_OR_DIR, reward:HUB_ID_OR_DIR, gpm:HUB_ID_OR_DIR, endpoint:URL, verifiable:ifeval,
    verifiable:math, python:FILE:FUNCTION, rules:concise or rules:cyclic."""
    preset: Literal["paper", "official"] = "paper"
    """How logits become preferences, and what the judge reads as the prompt."""
    selection: str = "all"
    """all, extremes (best and worst) or top-bottom:M."""
    judge_after: str | None = None
    """Judge only what follows this text in an answer, such as "</think>", in evaluation too; default: whole answers."""
    verdict_tokens: PositiveInt = 1
    """Tokens that an endpoint may answer with, in evaluation too: more than 1 for a judge that reasons first."""
    allow_no_signal: Annotated[bool, LAYOUT] = False
    """Go on where the judge prefers no answer to another, in evaluation too."""
    scoring_options: Annotated[
        ScoreConfig, SettingsOf(ScoreConfig, name="scoring_options", decided=_OF_SCORING, by="self-play")
    ] = field(default_factory=lambda: ScoreConfig(**_OF_SCORING))
    """Further settings of `megatron-sppo score`, NAME=VALUE (in YAML a mapping). They win over the ones above."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation after each iteration."""

    heldout_prompts: NonNegativeInt | None = None
    """Prompts kept from training for the evaluation. None: the rows of heldout_split; N: a random choice of the other
    rows; 0: none, and no evaluation. Rows of heldout_split are never trained on."""
    eval_num_responses: PositiveInt | None = None
    """Answers a prompt and policy. None: as many as in training."""
    eval_judge: str | None = None
    """Judge of the evaluation. None: the one of training."""
    bootstrap_resamples: PositiveInt = MIN_RESAMPLES
    """Resamples of the 95 % interval."""
    inspected_prompts: Annotated[NonNegativeInt, LAYOUT] = 4
    """Training prompts whose answers each iteration's report shows token by token, coloured by log-ratio; 0: none."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.bootstrap_resamples < MIN_RESAMPLES:
            raise ConfigError(
                f"bootstrap_resamples is {self.bootstrap_resamples}; a 95 % interval wants at least {MIN_RESAMPLES}. "
                f"Use --bootstrap-resamples {MIN_RESAMPLES}."
            )


@dataclass(frozen=True, kw_only=True)
class SelfPlayConfig:
    """Align a model by self-play: rollouts, preferences, training and evaluation, iteration by iteration."""

    run: RunConfig
    scoring: ScoringConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: Annotated[
        TrainingConfig, SettingsOf(TrainingConfig, name="training", decided=_OF_TRAINING, by="self-play")
    ]
    """Settings of `megatron-sppo train`, NAME=VALUE. In YAML a mapping, such as `training: {lr: 5e-7}`."""
    tracking: Annotated[TrackingConfig, LAYOUT] = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.servers.server and self.run.iterations > 1 and self.servers.server_weights == "trust":
            raise ConfigError(
                f"server_weights is trust with {self.run.iterations} iterations: servers would go on with the weights "
                "of the first. Use --rollout-options server_weights=prove."
            )
        if self.training.objective.objective == "mnpo":
            self._check_past_policies()
        self._check_adapters()

    def _check_past_policies(self) -> None:
        """Refuse weights that are not one for each earlier policy, and to remove policies that will be read."""
        past, weights = self.run.past_policies, self.training.objective.reference_weights
        if weights and len(weights) != past:
            raise ConfigError(
                f"{len(weights)} reference_weights are given for past_policies {past}. "
                f"Use --past-policies {len(weights)}, or as many weights."
            )
        if self.run.keep_last is not None and self.run.keep_last <= past:
            raise ConfigError(
                f"keep_last is {self.run.keep_last}, and objective mnpo reads pi_t and {past} policies before it. "
                f"Use --keep-last {past + 1}, or a smaller --past-policies."
            )

    def _check_adapters(self) -> None:
        """Refuse settings of adapters that fit neither each other nor what self-play decides."""
        adapters, merges = self.training.adapters, self.run.lora_merge_each_iteration
        if adapters.load_adapter is not None:
            raise ConfigError(
                "training names load_adapter, which self-play decides: iterations begin with B = 0, or where the one "
                "before ended. Leave it out, or merge that adapter into --model."
            )
        if merges and adapters.lora_rank is None:
            raise ConfigError(
                "lora_merge_each_iteration is set and there are no adapters. Use --training lora_rank=16 beside it."
            )
        if merges and self.training.objective.objective == "onpo":
            raise ConfigError(
                "objective onpo goes on with two adapters on one model, which lora_merge_each_iteration changes. "
                "Leave --lora-merge-each-iteration out."
            )
        if self.swaps_adapters and self.run.rollout_command:
            raise ConfigError(
                "rollout_command samples with models, and an iteration's policy is an adapter on one. "
                "Use --lora-merge-each-iteration, or leave --rollout-command out."
            )

        rank = adapters.lora_rank or 0
        if self.swaps_adapters and rank > MAX_LORA_RANK and not self.servers.server:
            raise ConfigError(
                f"lora_rank is {rank}, and vLLM holds adapters of rank {MAX_LORA_RANK} at most. "
                f"Use --training lora_rank={MAX_LORA_RANK}, or --lora-merge-each-iteration."
            )

    @property
    def swaps_adapters(self) -> bool:
        """Whether policies are adapters on the start model, and not models."""
        return self.training.adapters.lora_rank is not None and not self.run.lora_merge_each_iteration

    @property
    def keeps_engine(self) -> bool:
        """Whether one engine samples for all stages: all have its weights, and it is on this machine."""
        is_here = self.rollout_pool.is_embedded and not self.servers.server and not self.run.rollout_launcher
        return self.run.keep_engine and self.swaps_adapters and is_here

    @property
    def rollout_pool(self) -> PoolConfig:
        """The pool of rollouts: the stage's own where it has one, and the run's otherwise."""
        own = self.rollout.rollout_options.pool
        return self.run.pool if own == PoolConfig() else own

    def tracking_of(self, stage: str) -> TrackingConfig:
        """Spell who is told of a training stage: whom the run tells, unless training has its own -> config."""
        own, shared = self.training.run.tracking, self.tracking
        if own != TrackingConfig() or shared.tracker == TrackingConfig().tracker:
            return own
        name = shared.tracker_run_name or self.run.output.absolute().name
        return replace(
            shared,
            tracker_run_name=f"{name}-{stage}",
            tracker_group=shared.tracker_group or name,
            tracker_dir=shared.tracker_dir or self.run.output / OFFLINE_NAME,
        )

    @property
    def servers(self) -> ServerConfig:
        """The servers of rollouts; of several iterations they must prove what they hold."""
        servers = self.rollout.rollout_options.servers
        asked = servers.server_weights
        return replace(
            servers,
            server=servers.server or self.rollout.server,
            server_weights="prove" if asked == "ask" and self.run.iterations > 1 else asked,
        )

    @property
    def eval_num_responses(self) -> int:
        """Answers a prompt and policy in the evaluation."""
        return self.evaluation.eval_num_responses or self.rollout.num_responses

    @property
    def eval_judge(self) -> str:
        """The evaluation's judge."""
        return self.evaluation.eval_judge or self.scoring.judge


def record(config: SelfPlayConfig) -> dict[str, Any]:
    """Turn the config into what state.json keeps, which `read_record` reads -> nested dict."""
    values = config_files.to_dict(config)
    return {section.name: values[section.name] for section in fields(SelfPlayConfig)}


def read_record(content: dict[str, Any], *, place: Path) -> SelfPlayConfig:
    """Read what state.json keeps of a config; earlier versions kept the texts of the YAML file.

    Raises:
        ConfigError: a setting that this version does not know.
    """
    known = {section.name for section in fields(SelfPlayConfig)}
    sections = {name: values for name, values in content.items() if name in known}
    return config_files.from_dict(SelfPlayConfig, sections, place=str(place))


def check_unchanged(
    before: SelfPlayConfig, now: SelfPlayConfig, run_dir: Path, *, unused: Collection[str] = ()
) -> None:
    """Refuse to go on with a run under other settings, except those that do not decide its result.

    More iterations change nothing of those done, unless the prompts are divided by their number. Nor does a shard size
    that is left open: rollouts that were begun keep theirs, which earlier versions put into the record.

    Args:
        unused: settings that no stage has used yet, by how their names begin, such as "scoring.".

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    old, new = config_files.deciding(before), config_files.deciding(now)
    is_divided = now.run.prompts_per_iteration == "disjoint" and len(now.run.prompts) == 1
    if not is_divided and now.run.iterations > before.run.iterations:
        old["run.iterations"] = new["run.iterations"]
    if now.rollout.rollout_options.shard_size is None:
        del old["rollout.rollout_options.shard_size"]
    for path, value in old.items():
        if new[path] != value and not path.startswith(tuple(unused)):
            name = f"{path.partition('.')[0]}.{path.rpartition('.')[2]}"
            raise ConfigError(
                f"{name} is {_spell(new[path])}, but {run_dir} was begun with {_spell(value)}. "
                f"Set it back, or begin another run with another --output."
            )


def _spell(value: Any) -> str:
    return "not set" if value is None else config_files.spell(value)
