"""What a plan is told: a training config, how much there is to train on, and what the machine is taken to do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_sppo import config as configuration
from megatron_sppo.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Range, check_ranges
from megatron_sppo.errors import ConfigError
from megatron_sppo.training.config import OptimizationConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    """What is planned."""

    model: str | None = None
    """Hugging Face directory (its config.json is enough) or a built-in name such as llama3-70b. Unset: the model that
    the config file's name begins with."""
    world_size: tuple[PositiveInt, ...] = ()
    """Ranks; several sizes are planned side by side. Unset: one replica of the model."""
    json: bool = False
    """Print JSON in place of tables."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """One iteration's data. Means decide time; memory is decided by the longest micro-batch that is let through."""

    num_prompts: PositiveInt = 20_000
    """Prompts of an iteration; published runs take a third of UltraFeedback's 60,000."""
    num_responses: PositiveInt = 5
    """K answers sampled and judged for each prompt."""
    responses_trained: PositiveInt | None = None
    """Answers of a prompt that are trained on, each as often as there are pairs with it. Unset: by --selection, which
    is extremes (2, best and worst) where it is unset and the objective trains on pairs, and otherwise all: K answers,
    K (K - 1) in pairs."""
    mean_prompt_tokens: PositiveFloat = 160.0
    """Tokens; UltraFeedback's are near it."""
    mean_response_tokens: PositiveFloat = 350.0
    """Tokens of an answer."""
    num_iterations: PositiveInt = 3
    """Iterations of the run, for its disk."""
    keep_iterations: PositiveInt | None = None
    """Self-play's `keep_last`: iterations whose models stay on the disk. Unset: all."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What a GPU and its network are taken to do. Assumptions with their sources; few were measured here."""

    gpu_memory_gb: PositiveFloat = 80.0
    """10^9 bytes of an H100 SXM."""
    context_gib: NonNegativeFloat = 3.0
    """CUDA context, NCCL buffers of all groups and cuBLAS workspaces, GiB (assumed)."""
    fragmentation: Fraction = 0.05
    """Share of activations that the allocator wastes (assumed)."""
    bf16_tflops: PositiveFloat = 600.0
    """Of a layer's products while they run, traffic and bubble apart: 78 % of the 770 measured for one 8192^3 product
    on an H200. This and the next are chosen so that the plan lies within a quarter of three published runs."""
    fp8_tflops: PositiveFloat = 1000.0
    """The same in FP8, casts included; 1979 on paper."""
    fp8_layer_ms: NonNegativeFloat = 6.5
    """Least time of a layer's two passes over a micro-batch in FP8, whose kernels the host must launch; measured on an
    H200's host at the 1B shape (benchmarks/results/h200), where bfloat16 is faster for it."""
    gpus_per_node: PositiveInt = 8
    """GPUs that NVLink joins."""
    node_gb_per_s: PositiveFloat = 300.0
    """Bandwidth of a GPU's collectives within a node, one way; 450 of NVLink 4 on paper (assumed two thirds)."""
    network_gb_per_s: PositiveFloat = 40.0
    """Between nodes, for each GPU; 50 of a 400 Gbit/s adapter on paper (assumed 80 %)."""
    hbm_gb_per_s: PositiveFloat = 3350.0
    """Memory bandwidth on paper, H100 SXM; decoding is bound by it."""
    decode_efficiency: Annotated[float, Range(0, 1, above=True)] = 0.5
    """Share of `hbm_gb_per_s` that the sampler reaches (assumed)."""
    decode_sequences: PositiveInt = 256
    """Answers that one sampler decodes at a time; vLLM's default."""
    judge_tflops: PositiveFloat = 200.0
    """Sustained by PairRM (0.4 billion weights, bf16) in large batches (assumed)."""
    cores_per_node: PositiveInt = 112
    """CPU cores, which the ranks of a node share; a DGX H100's."""
    hash_gb_per_s: PositiveFloat = 1.4
    """sha256 by one thread; measured on an EPYC with SHA instructions (1.4 under load, 1.8 alone)."""
    thread_write_gb_per_s: PositiveFloat = 3.5
    """What one thread hands to the file system, whatever that makes of it; measured on the same."""
    thread_read_gb_per_s: PositiveFloat = 8.0
    """What one thread takes from it; measured likewise."""
    storage_gb_per_s: PositiveFloat = 2.0
    """Reading or writing files, for each node (assumed)."""
    file_system_gb_per_s: PositiveFloat = 100.0
    """Of the file system, all nodes together (assumed)."""
    device_copy_gb_per_s: PositiveFloat = 20.0
    """From a GPU to the CPU's memory, for each GPU; 64 of PCIe 5 on paper (assumed a third)."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainingConfig):
    """A training config with what a plan needs beside it. `lr` and paths may be there and change nothing."""

    plan: SubjectConfig = field(default_factory=SubjectConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(lr=5e-7))
    load: Path = Path()
    data: Path = Path()
    save: Path = Path()


def read_plan(argv: Sequence[str], *, name: str, description: str) -> tuple[PlanConfig, Path | None]:
    """Read the command line -> (config, the file of --config).

    The file may be one of training or one of self-play, whose section `training` and numbers of prompts, answers and
    ranks are then taken.

    Raises:
        ConfigError: as `config.parse`.
    """
    config = configuration.parse(PlanConfig, name=name, description=description, argv=argv, of_file=_of_self_play)
    return config, configuration.config_file(argv)


def _of_self_play(content: dict[str, Any]) -> dict[str, Any]:
    """Take what a plan reads from a self-play file -> settings; another kind of file as it is."""
    training = content.get("training")
    if not isinstance(training, dict):
        return content
    run, rollout, scoring = (_section(content, name) for name in ("run", "rollout", "scoring"))
    taken = {
        "num_responses": rollout.get("num_responses"),
        "num_prompts": run.get("max_prompts_per_iteration"),
        "num_iterations": run.get("iterations"),
        "keep_iterations": run.get("keep_last"),
        "world_size": run.get("training_processes"),
        "selection": scoring.get("selection"),
    }
    return {key: value for key, value in taken.items() if value is not None} | training


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{name} is a section and holds `key: value` lines, not {section!r}. Indent them below it.")
    return section
