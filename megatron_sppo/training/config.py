"""Everything one training run is told, in sections. Names are Megatron-LM's where it has one."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from megatron_sppo.config import (
    DECIDES,
    LAYOUT,
    TUNABLE,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    check_ranges,
    flag_of,
)
from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import AdapterConfig, ModelConfig
from megatron_sppo.objective.names import parse_baseline
from megatron_sppo.objective.table import OBJECTIVES, Objective, find_objective
from megatron_sppo.tracking.config import TrackingConfig
from megatron_sppo.training.safety_config import SafetyConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised: ALGORITHM by name, its strength and its baseline."""

    objective: str = "sppo"
    """One of sppo, sppo_single, sppo_hard, rspo, dpo, ipo, inpo, onpo, mnpo, nash_md. All but sppo and rspo train on
    pairs: best and worst of a prompt. rspo, inpo, onpo and nash_md look at one more policy, `reference`; mnpo, dpo and
    ipo at any number of them."""
    eta: Annotated[float, Range(0, 1e6, above=True)] = 1000.0
    """Nats per unit of preference (uclaml/SPPO and TRL call 1/eta `beta`). Published runs use 1000. Not for dpo and
    ipo."""
    baseline: str = "half"
    """What stands for log Z: half, group_mean, estimate, or constant:C (eta * C). Only for sppo and rspo."""
    beta: PositiveFloat = 0.1
    """Strength of dpo and ipo, 1/nats. Only for them: theirs is what 1/eta is to the others."""
    reference_weights: Annotated[tuple[float, ...], Range(0, 1)] = ()
    """Weight of each `reference` in the mixture of policies that log-ratios are taken against (a geometric one); pi_t
    has the rest of 1. Unset: 1/3 with inpo and nash_md (their papers' tau / eta, and eta tau), 1 with onpo, all alike
    and like pi_t with mnpo; dpo and ipo need them. Not used by rspo."""
    reverse_kl_weight: NonNegativeFloat = 0.5
    """Weight of rspo's penalty (log pi_theta/mu)^2, mu the `reference`. Only for rspo."""
    forward_kl_weight: NonNegativeFloat = 0.0
    """Weight of rspo's penalty mu/pi_theta, which stops at exp(10). Only for rspo."""

    def __post_init__(self) -> None:
        check_ranges(self)
        name = self.row.name  # refuses one that is unknown
        if parse_baseline(self.baseline) != "half" and name not in ("sppo", "rspo"):
            raise ConfigError(
                f"baseline {self.baseline} belongs to the objective sppo, not to {name}. Use --baseline half."
            )
        self.check_given([field.name for field in fields(self) if getattr(self, field.name) != field.default])

    def check_given(self, given: Collection[str]) -> None:
        """Refuse what somebody gave and the objective does not read (`config.check_given`); of eta it is told.

        Raises:
            ConfigError: names it, and who reads it.
        """
        if "eta" in given and not self.row.reads("eta") and self.eta != type(self).eta:
            # No refusal: one recipe serves several objectives.
            logger.warning(
                "eta %g is not read by the objective %s, whose strength is beta, %g here. For as strong a pull use "
                "--beta %.6g (beta = 1 / eta)",
                *(self.eta, self.objective, self.beta, 1 / self.eta),
            )
        for name in ("beta", "reverse_kl_weight", "forward_kl_weight"):
            if name not in given or self.row.reads(name):
                continue
            value, readers = getattr(self, name), [row.name for row in OBJECTIVES.values() if row.reads(name)]
            remedy = f"use --objective {readers[0]}"
            if name == "beta":
                remedy = f"use --eta {1 / value:.6g} for this strength (eta = 1 / beta)"
            raise ConfigError(
                f"{name} {value} is read by {' and '.join(readers)} alone, not by the objective {self.objective}. "
                f"Leave {flag_of(name)} out, or {remedy}."
            )

    @property
    def row(self) -> Objective:
        """The objective's row of the table, at this strength."""
        return find_objective(
            self.objective,
            eta=self.eta,
            beta=self.beta,
            reference_weights=self.reference_weights,
            reverse_kl_weight=self.reverse_kl_weight,
            forward_kl_weight=self.forward_kl_weight,
        )


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimizer and schedule, by Megatron-LM's names."""

    lr: Annotated[float, Range(0, 100, above=True)]
    """Highest learning rate. Published runs use 5e-7."""
    optimizer: Annotated[Literal["adam", "rmsprop"], DECIDES] = "adam"
    """adam (decoupled weight decay) or rmsprop (the official SPPO code: alpha 0.99, eps 1e-8, no momentum)."""
    min_lr: NonNegativeFloat = 0.0
    """Lowest learning rate, reached at the end of the decay."""
    lr_decay_style: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: PositiveInt | None = None
    """Steps over which the rate decays; unset: the whole run."""
    lr_warmup_iters: NonNegativeInt | None = None
    """Steps of linear warm-up."""
    lr_warmup_fraction: Annotated[float, Range(0, 1, below=True)] | None = None
    """Warm-up as a fraction of lr_decay_iters, instead of lr_warmup_iters. Published runs use 0.1."""
    adam_beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """First-moment decay of Adam."""
    adam_beta2: Annotated[float, Range(0, 1, below=True)] = 0.999
    """Second-moment decay of Adam."""
    adam_eps: Annotated[float, Range(0, 1, above=True)] = 1e-8
    """Added to the root of the second moment."""
    rmsprop_alpha: Annotated[float, Range(0, 1, below=True)] = 0.99
    """Second-moment decay of RMSprop."""
    weight_decay: Fraction = 0.0
    """Decoupled weight decay; one-dimensional parameters and biases are spared."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    optimizer_config: tuple[str, ...] = ()
    """Further KEY=VALUE fields of Megatron-Core's OptimizerConfig."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr ({self.min_lr}) is above lr ({self.lr}). Use --min-lr 0, or a larger --lr.")
        if self.lr_warmup_iters is not None and self.lr_warmup_fraction is not None:
            raise ConfigError("lr_warmup_iters and lr_warmup_fraction are both set. Leave one out.")
        if self.optimizer == "rmsprop" and self.weight_decay:
            raise ConfigError(
                "rmsprop runs without weight decay here, as the official SPPO code does. Use --weight-decay 0."
            )

    def warmup_and_decay(self, train_iters: int) -> tuple[int, int]:
        """Count the steps of the warm-up, and those after which the decay has ended -> (warm-up, decay).

        Raises:
            ConfigError: the warm-up is as long as the decay, or longer.
        """
        decay, flag = self.lr_decay_iters or train_iters, "--lr-warmup-iters"
        warmup = self.lr_warmup_iters or 0
        if self.lr_warmup_fraction is not None:
            warmup, flag = round(self.lr_warmup_fraction * decay), "--lr-warmup-fraction"
        if warmup >= decay:
            raise ConfigError(
                f"the warm-up ({warmup} steps) must be shorter than the decay ({decay} steps"
                f"{'' if self.lr_decay_iters else ', the whole run'}). Use {flag} 0, or a smaller one than now."
            )
        return warmup, decay


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout, by Megatron-Core's names. Data parallelism is what remains of the world size."""

    tensor_model_parallel_size: Annotated[PositiveInt, LAYOUT] = 1
    """Ranks that split each weight matrix."""
    pipeline_model_parallel_size: Annotated[PositiveInt, LAYOUT] = 1
    """Stages that the layers are divided into."""
    decoder_first_pipeline_num_layers: Annotated[PositiveInt | None, LAYOUT] = None
    """Layers of the first stage, where they are not the even share: 61 layers are 13 + 16 + 16 + 16."""
    decoder_last_pipeline_num_layers: Annotated[PositiveInt | None, LAYOUT] = None
    """Layers of the last stage, likewise."""
    virtual_pipeline_model_parallel_size: Annotated[PositiveInt | None, LAYOUT] = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel_size: Annotated[PositiveInt, LAYOUT] = 1
    """Ranks that split each sequence."""
    expert_model_parallel_size: Annotated[PositiveInt, LAYOUT] = 1
    """Ranks that the experts of each layer are divided over. They may be data-, tensor- and context-parallel ranks."""
    sequence_parallel: Annotated[bool, LAYOUT] = False
    """Split the activations of norms along the sequence over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and master weights over the data-parallel ranks."""
    ddp_config: Annotated[tuple[str, ...], TUNABLE] = ()
    """Further KEY=VALUE fields of Megatron-Core's DistributedDataParallelConfig, such as overlap_grad_reduce=true."""
    distributed_timeout_minutes: Annotated[PositiveInt, TUNABLE] = 30
    """Give up on a collective after this long."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
            value = getattr(self, name)
            if value is not None and self.pipeline_model_parallel_size < 2:
                raise ConfigError(
                    f"{name} is {value} with {self.pipeline_model_parallel_size} pipeline stage(s); it is the layers "
                    f"of one of several stages. Leave {flag_of(name)} out."
                )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "sequence_parallel splits activations over tensor-parallel ranks, and there is one. "
                "Use --no-sequence-parallel, or --tensor-model-parallel-size 2 or more."
            )
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is not None and (chunks < 2 or self.pipeline_model_parallel_size < 2):
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size {chunks} with {self.pipeline_model_parallel_size} stage(s) "
                "interleaves nothing: both must be at least 2. Leave --virtual-pipeline-model-parallel-size out."
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_parallel_size(self) -> int:
        """Ranks that split each expert's matrices.

        Experts that are divided over ranks stay whole: small matrices are not worth splitting. Undivided, they are
        split like all else, as Megatron-Core reduces their gradients over the dense layers' groups then.
        """
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Which responses a step sees, and in what pieces. Batch sizes count responses (sequences), not pairs or tokens."""

    micro_batch_size: Annotated[PositiveInt, LAYOUT] = 1
    """Responses in one forward pass of one data-parallel rank. Of no effect with `packed_sequence_size`."""
    global_batch_size: PositiveInt = 128
    """Responses in one optimizer step; the published runs use 128 (64 pairs)."""
    seq_length: Annotated[PositiveInt | None, TUNABLE] = None
    """Longest prompt + response, in tokens; longer ones are left out and counted. Unset: as many as the model has
    positions. The official recipe uses 1024."""
    max_prompt_length: PositiveInt | None = None
    """Keep this many tokens of a longer prompt, from its end (official recipe: 512); unset: no prompt is cut."""
    packing: Annotated[bool, TUNABLE] = True
    """Lay the responses of a micro-batch end to end instead of padding each to the longest."""
    packed_sequence_size: Annotated[PositiveInt | None, LAYOUT] = None
    """Tokens in one forward pass of one data-parallel rank, at most (its context-parallel ranks share them). Responses
    are packed by length into as few micro-batches as hold them, and `micro_batch_size` limits nothing. At least the
    longest prompt + response (with dpo and ipo: the longest pair); rounded down to a multiple that suits the layout.
    Unset: micro-batches of `micro_batch_size` responses."""
    share_prompts: bool = False
    """Compute a prompt once for all its responses in a micro-batch. Prompts are then shuffled rather than responses, so
    that those of one prompt meet in a global batch. Needs `packed_sequence_size`."""
    selection: str | None = None
    """all, extremes or top-bottom:M; unset: what the dataset's manifest says."""
    num_epochs: Annotated[PositiveInt | None, TUNABLE] = None
    """Passes over the dataset. Unset: one, as the published runs make, or as many as `train_iters` takes."""
    reference_per_epoch: Annotated[bool, TUNABLE] = False
    """Compute log pi_t of each epoch's responses in the micro-batches of that epoch, all before the first step: as many
    reference passes as epochs. Otherwise one pass, in the first epoch's: where a response's log-probability depends on
    what shares its micro-batch (FP8 in tensorwise scaling), later epochs carry that as noise."""
    train_iters: Annotated[PositiveInt | None, TUNABLE] = None
    """Optimizer steps, the data repeated as often as it takes. With `num_epochs` too, the run ends at the first."""
    seed: Seed = 1234
    """Seed of the data order."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.packed_sequence_size is not None and not self.packing:
            raise ConfigError("packed_sequence_size needs packing. Use --packing, or --micro-batch-size in its place.")
        if self.share_prompts and self.packed_sequence_size is None:
            raise ConfigError(
                "share_prompts lays responses behind their prompt in packs of packed_sequence_size tokens, and none is "
                "set. Use for example --packed-sequence-size 8192."
            )

    def num_steps(self, steps_per_epoch: int) -> int:
        """Count the optimizer steps of a run whose epochs have so many -> int."""
        by_epochs = steps_per_epoch * (self.num_epochs or 1)
        if self.train_iters is None or self.num_epochs is None:
            return self.train_iters or by_epochs
        return min(self.train_iters, by_epochs)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is written while it runs."""

    log_interval: PositiveInt = 1
    """Steps between lines on the screen; metrics.jsonl has every step."""
    save_interval: PositiveInt | None = None
    """Steps between checkpoints; unset: only the last step is saved."""
    async_save: Annotated[bool, LAYOUT] = False
    """Write checkpoints while training goes on, by a forked process of each rank, which holds a copy of the weights and
    the optimizer's state in the CPU's memory until then. One at a time: the next save waits for it, and the last one,
    and the one at SIGTERM, are waited for."""
    keep_last: Annotated[PositiveInt | None, LAYOUT] = None
    """Checkpoints of this run to keep under --save, the newest ones; older ones are removed after each save. Unset: all
    are kept."""
    grace_seconds: Annotated[PositiveFloat | None, LAYOUT] = None
    """Seconds between SIGTERM and the end of the run, in which a checkpoint must be whole; a run says at start where it
    cannot be. Unset: what SBATCH_SIGNAL says (TERM@120), else 120 in a Slurm job and 30 elsewhere."""
    reference_piece_seconds: Annotated[PositiveFloat, LAYOUT] = 60.0
    """Seconds of the reference pass that a kill may cost: as often, what was computed since is kept, and the same
    command goes on from there."""
    tensorboard: bool = True
    """Write TensorBoard events under --save/tensorboard, where tracker names it."""
    tracking: Annotated[TrackingConfig, LAYOUT] = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One iteration's training: pi_t's checkpoint and a dataset of its judged responses in, pi_{t+1} out."""

    load: Annotated[Path, LAYOUT]
    """Megatron checkpoint of pi_t: a root (its tracker decides) or one iter_* directory."""
    data: Annotated[Path, LAYOUT]
    """Dataset directory written by `megatron-sppo score`."""
    save: Annotated[Path, LAYOUT]
    """Where checkpoints, metrics.jsonl and the resolved config go. If it has a checkpoint, the run resumes from it."""
    reference: Annotated[tuple[Path, ...], LAYOUT] = ()
    """Megatron checkpoints (as --load) of further policies that the objective looks at beside pi_t, such as the start
    model with inpo. log pi of each is computed once, by this model in this layout, before the first step."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimization: Annotated[OptimizationConfig, TUNABLE]
    model: Annotated[ModelConfig, TUNABLE] = field(default_factory=ModelConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: Annotated[RunConfig, TUNABLE] = field(default_factory=RunConfig)
    safety: Annotated[SafetyConfig, TUNABLE] = field(default_factory=SafetyConfig)

    def __post_init__(self) -> None:
        row, batch = self.objective.row, self.batch
        if self.model.has_router_losses and (batch.share_prompts or not batch.packing):
            raise ConfigError(
                "moe_aux_loss_coeff and moe_z_loss_coeff are computed of packed micro-batches alone, each response "
                "behind a prompt of its own. Use --packing and --no-share-prompts."
            )
        if batch.packed_sequence_size is None and batch.micro_batch_size % row.rows_per_loss:
            raise ConfigError(
                f"objective {row.name} couples pairs, so micro_batch_size ({batch.micro_batch_size}) must be even. "
                f"Use --micro-batch-size {batch.micro_batch_size + 1}."
            )
        if row.needs_pairs and batch.global_batch_size % 2:
            raise ConfigError(
                f"objective {row.name} trains on pairs, so global_batch_size ({batch.global_batch_size}) must be even. "
                f"Use --global-batch-size {batch.global_batch_size + 1}."
            )

    def check_batch(self, *, data_parallel_size: int) -> None:
        """Refuse a global batch that the ranks cannot share evenly; packs of tokens need no such thing.

        Raises:
            ConfigError: names the numbers and the next size that fits.
        """
        if self.batch.packed_sequence_size is not None:
            return
        share = self.batch.micro_batch_size * data_parallel_size
        if self.batch.global_batch_size % share:
            fitting = -(-self.batch.global_batch_size // share) * share
            raise ConfigError(
                f"global_batch_size ({self.batch.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.batch.micro_batch_size}) x {data_parallel_size} data-parallel ranks. "
                f"Use --global-batch-size {fitting}."
            )


@dataclass(frozen=True, kw_only=True)
class InspectionConfig(TrainingConfig):
    """Two checkpoints and a dataset. Takes every setting of pretrain_sppo.py, so `--config SAVE/config.yaml` fits."""

    load: Path
    """Megatron checkpoint of the policy, such as the --save of a training: a root or one iter_* directory."""
    reference: tuple[Path, ...]
    """Megatron checkpoint that it is compared with: pi_t, the --load of that training. One."""
    output: Path
    """JSONL file to write, a line for each response."""
    num_prompts: PositiveInt = 4
    """Prompts whose responses are inspected, taken evenly from the most to the least decided by the judge."""
    save: Path = Path()
    """Not used here: nothing is trained. Nor are the settings of the optimizer and the objective."""
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(lr=1.0))

    def __post_init__(self) -> None:
        check_ranges(self)
        super().__post_init__()
        if len(self.reference) != 1:
            raise ConfigError(
                f"{len(self.reference)} checkpoints are given to compare {self.load} with. Use --reference DIR with "
                "one, pi_t."
            )
