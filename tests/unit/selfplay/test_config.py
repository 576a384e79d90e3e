"""Proves: one YAML file makes a run's settings, training's reach training unchanged, and a begun run keeps its own."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sppo.config import deciding, parse
from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.config import EvaluateConfig, ScoreConfig
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.selfplay.commands import check_stages, iteration_stages, start_stages
from megatron_sppo.selfplay.config import LAUNCHERS, SelfPlayConfig, check_unchanged, read_record, record
from megatron_sppo.selfplay.paths import RunPaths
from megatron_sppo.tracking.config import TrackingConfig
from megatron_sppo.training.config import InspectionConfig, TrainingConfig

YAML = """
run: {iterations: 2, prompts_per_iteration: all}
scoring: {judge: rules:concise}
rollout:
  num_responses: 4
  max_tokens: 64
  rollout_options: {max_model_len: 512, enforce_eager: true}
training:
  lr: 4e-5
  optimizer: adam
  optimization: {lr_warmup_iters: 2}
  transformer_config: [a=1, b=2]
  train_iters: null
"""


def read(tmp_path: Path, *argv: str, text: str = YAML) -> SelfPlayConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    required = ("--model", "m", "--prompts", "p.jsonl", "--output", str(tmp_path / "out"))
    return parse(SelfPlayConfig, name="self_play.py", description="", argv=["--config", str(file), *required, *argv])


def commands(config: SelfPlayConfig) -> dict[str, tuple[str, ...]]:
    """Spell the commands of the start and of the first iteration -> {stage: tokens}."""
    paths = RunPaths(run_dir=config.run.output)
    stages = [*start_stages(config, paths, evaluates=True), *iteration_stages(config, paths, 1, evaluates=True)]
    return {stage.name: stage.command for stage in stages}


def as_the_stage_reads(kind: type, command: tuple[str, ...]) -> Any:
    """Parse a stage's flags by its own config, as `python -m megatron_sppo NAME` does."""
    assert command[:3] == (sys.executable, "-m", "megatron_sppo")
    return parse(kind, name="stage", description="", argv=command[4:])


def test_training_settings_arrive_as_they_were_written(tmp_path: Path) -> None:
    config = read(tmp_path)
    training = as_the_stage_reads(TrainingConfig, commands(config)["iter_1-train"])
    assert (training.optimization.lr, training.optimization.lr_warmup_iters) == (4e-5, 2)
    assert training.model.transformer_config == ("a=1", "b=2") and training.batch.train_iters is None
    out = tmp_path / "out"
    paths = {"load": out / "base", "data": out / "iter_1/dataset", "save": out / "iter_1/checkpoint"}
    assert training == dataclasses.replace(config.training, **paths)
    inspection = as_the_stage_reads(InspectionConfig, commands(config)["iter_1-inspect"])
    assert (inspection.model, inspection.batch, inspection.num_prompts) == (training.model, training.batch, 4)


def test_typed_settings_are_laid_over_the_file_s(tmp_path: Path) -> None:
    config = read(tmp_path, "--training", "lr=5.0e-7", "eta=5", "--rollout-options", "max_model_len=2048")
    assert (config.training.optimization.lr, config.training.objective.eta) == (5e-7, 5)
    assert config.training.optimization.lr_warmup_iters == 2
    options = config.rollout.rollout_options
    assert (options.max_model_len, options.engine.enforce_eager) == (2048, True)


def test_a_json_object_may_be_typed_with_values_of_any_type(tmp_path: Path) -> None:
    typed = '{"lr": 5e-7, "packing": false, "train_iters": null, "model": {"transformer_config": {"a": true}}}'
    training = read(tmp_path, "--training", typed, "eta=5").training
    assert (training.optimization.lr, training.objective.eta, training.batch.packing) == (5e-7, 5, False)
    assert training.model.transformer_config == ("a=True",) and training.batch.train_iters is None


def test_null_lists_and_mappings_of_megatron_s_own_fields_keep_their_type(tmp_path: Path) -> None:
    as_json = '{"ddp_config": {"a": null, "b": [0, 1], "c": {"d": 2}}}'
    for typed in (as_json, "ddp_config={a: null, b: [0, 1], c: {d: 2}}"):
        fields = read(tmp_path, "--training", typed).training.parallel.ddp_config
        assert {name: yaml.safe_load(text) for name, _, text in (field.partition("=") for field in fields)} == {
            "a": None,
            "b": [0, 1],
            "c": {"d": 2},
        }


def test_sampling_and_options_become_flags_of_the_rollout_stage(tmp_path: Path) -> None:
    generate = as_the_stage_reads(GenerateConfig, commands(read(tmp_path, "--max-tokens", "256"))["iter_1-rollouts"])
    assert (generate.num_responses, generate.max_tokens, generate.temperature, generate.seed) == (4, 256, 1.0, 1)
    assert (generate.max_model_len, generate.engine.enforce_eager) == (512, True)
    assert (generate.model, generate.prompts) == (Path("m"), tmp_path / "out" / "prompts" / "iter_1.jsonl")


def test_an_option_wins_over_the_section_s_setting(tmp_path: Path) -> None:
    options = ("temperature=0.7", "tensor_parallel_size=2", "allow_no_signal=true", "max_model_len=None")
    of_scoring = ("selection=extremes", "judge_after=</think>", "max_requests=7", "allow_no_signal=true")
    spelled = commands(read(tmp_path, "--rollout-options", *options, "--scoring-options", *of_scoring))
    generate = as_the_stage_reads(GenerateConfig, spelled["iter_1-rollouts"])
    assert (generate.temperature, generate.engine.tensor_parallel_size, generate.max_model_len) == (0.7, 2, None)
    scoring = as_the_stage_reads(ScoreConfig, spelled["iter_1-dataset"])
    assert (scoring.selection, scoring.judge_after, scoring.max_requests) == ("extremes", "</think>", 7)
    assert generate.allow_no_signal and scoring.allow_no_signal
    evaluation = as_the_stage_reads(EvaluateConfig, spelled["iter_1-eval"])
    assert (evaluation.judge_after, evaluation.allow_no_signal) == ("</think>", True)
    smaller = (
        "--rollout-tensor-parallel-size",
        "4",
        "--verdict-tokens",
        "512",
        "--scoring-options",
        "verdict_tokens=2",
    )
    spelled = commands(read(tmp_path, "--rollout-options", "tensor_parallel_size=2", *smaller))
    assert as_the_stage_reads(GenerateConfig, spelled["iter_1-rollouts"]).engine.tensor_parallel_size == 2
    assert as_the_stage_reads(ScoreConfig, spelled["iter_1-dataset"]).verdict_tokens == 2
    assert as_the_stage_reads(EvaluateConfig, spelled["iter_1-eval"]).verdict_tokens == 2
    spelled = commands(read(tmp_path, "--rollout-options", "preset=official", "--scoring-options", "preset=official"))
    for name in ("base-eval-rollouts", "iter_1-rollouts"):
        sampling = as_the_stage_reads(GenerateConfig, spelled[name]).sampling()
        assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
    assert as_the_stage_reads(EvaluateConfig, spelled["iter_1-eval"]).preset == "official"


def test_the_run_s_pool_reaches_every_stage_that_has_one_and_a_stage_s_own_wins(tmp_path: Path) -> None:
    def pools(*flags: str) -> list[tuple[int | None, str | None]]:
        spelled = commands(read(tmp_path, *flags))
        stages = {"iter_1-rollouts": GenerateConfig, "iter_1-dataset": ScoreConfig, "iter_1-eval": EvaluateConfig}
        read_stages = (as_the_stage_reads(kind, spelled[name]) for name, kind in stages.items())
        return [(stage.pool.workers, stage.pool.ray) for stage in read_stages]

    assert pools() == [(None, None)] * 3
    assert pools("--workers", "4", "--ray", "auto") == [(4, "auto")] * 3
    own = ("--rollout-options", "workers=2", "--scoring-options", "workers=3")
    assert pools("--ray", "auto", *own) == [(2, None), (3, None), (3, None)]
    tokens = commands(read(tmp_path, "--workers", "4", "--rollout-command", "my-sampler"))["iter_1-rollouts"]
    assert "--workers" not in tokens, "a command of the user's own promises no such flag"


def test_a_sampler_of_the_user_s_own_gets_the_documented_flags(tmp_path: Path) -> None:
    tokens = commands(read(tmp_path, "--rollout-command", "python 'my sampler.py' --fast"))["base-eval-rollouts"]
    assert tokens[:3] == ("python", "my sampler.py", "--fast") and "--allow-no-signal" not in tokens
    documented = ("model", "prompts", "output", "num-responses", "max-tokens", "temperature", "top-p", "seed")
    assert {f"--{name}" for name in documented} <= set(tokens)


def test_a_launcher_of_the_user_s_own_starts_the_training_command(tmp_path: Path) -> None:
    launcher = "srun torchrun --nnodes 4 --nproc-per-node 8"
    spelled = commands(read(tmp_path, "--training-launcher", launcher, "--training-processes", "32"))
    for stage, name in (("iter_1-train", "train"), ("iter_1-inspect", "inspect")):
        assert spelled[stage][:9] == (*shlex.split(launcher), "-m", "megatron_sppo", name)


def test_each_launcher_starts_its_stages_in_python_s_place_and_no_other(tmp_path: Path) -> None:
    """By hand: which stage is started by which setting; what none starts is started by this python."""
    started = {
        "rollout-launcher": {"base-eval-rollouts", "iter_1-rollouts", "iter_1-eval-rollouts"},
        "scoring-launcher": {"iter_1-dataset", "iter_1-eval"},
        "inspection-launcher": {"iter_1-inspect"},
        "training-launcher": {"iter_1-train", "iter_1-inspect"},
        "conversion-launcher": {"import", "iter_1-export"},
    }
    plain = commands(read(tmp_path))
    for name, stages in started.items():
        spelled = commands(read(tmp_path, f"--{name}", f"srun --job-name '{name} 1' python"))
        for stage, command in spelled.items():
            expected = ("srun", "--job-name", f"{name} 1", "python") if stage in stages else (sys.executable,)
            assert command == (*expected, *plain[stage][1:])
    both = ("--training-launcher", "srun torchrun", "--inspection-launcher", "srun --nodes 1 torchrun")
    spelled = commands(read(tmp_path, *both))
    assert spelled["iter_1-inspect"][:4] == ("srun", "--nodes", "1", "torchrun")
    assert spelled["iter_1-train"][:2] == ("srun", "torchrun")


def test_trackers_of_a_run_are_those_of_its_training_under_names_of_its_own(tmp_path: Path) -> None:
    spelled = commands(read(tmp_path, "--tracker", "wandb", "mlflow", "--tracker-offline"))
    told = as_the_stage_reads(TrainingConfig, spelled["iter_1-train"]).run.tracking
    assert (told.tracker, told.tracker_offline) == (("wandb", "mlflow"), True)
    assert (told.tracker_run_name, told.tracker_group) == ("out-iter_1-train", "out")
    assert told.tracker_dir == tmp_path / "out" / "trackers"
    spelled = commands(read(tmp_path, "--tracker", "wandb", "--training", "tracker=[mlflow]"))
    assert as_the_stage_reads(TrainingConfig, spelled["iter_1-train"]).run.tracking.tracker == ("mlflow",)
    assert not [token for token in commands(read(tmp_path))["iter_1-train"] if token.startswith("--tracker")]


def test_settings_of_the_judge_hold_in_training_and_in_evaluation(tmp_path: Path) -> None:
    flags = ("--judge-after", "</think>", "--verdict-tokens", "512", "--allow-no-signal")
    for given in ((), flags):
        spelled = commands(read(tmp_path, *given))
        for name in ("iter_1-dataset", "iter_1-eval"):
            assert tuple(token for token in spelled[name] if token in flags) == given


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--training", "lr"), "training holds 'lr'. Write NAME=VALUE"),
        (("--training", "etaa=10"), "section training: unknown key 'etaa'. Did you mean eta"),
        (("--training", "save=elsewhere"), "training sets save, which self-play decides itself"),
        (("--training", "lr=0"), "lr is 0"),
        (("--training", "objective=dpo"), "micro_batch_size .1. must be even"),
        (("--rollout-options", "shard_sizes=4"), "section rollout_options: unknown key 'shard_sizes'"),
        (("--rollout-options", "shard_size=0"), "shard_size is 0"),
        (("--rollout-options", "seed=3"), "rollout_options sets seed, which self-play decides itself"),
        (("--scoring-options", "max_requests=many"), "--max-requests"),
        (("--scoring-options", "output=x"), "scoring_options sets output"),
    ],
)
def test_a_stage_s_settings_are_refused_in_its_own_words(tmp_path: Path, flags: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, *flags)


def test_training_needs_a_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lr is missing. Give it .* in the --config file, in section training"):
        read(tmp_path, text="scoring: {judge: rules:concise}")


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--judge", "rules:nice"), "rules:nice is unknown"),
        (("--judge", "matrices:m.jsonl"), "cannot judge new ones"),
        (("--eval-judge", "nice"), "'nice' is not a judge"),
        (("--temperature", "0"), "temperature is 0"),
        (("--top-p", "1.5"), "top_p is 1.5"),
        (("--selection", "some"), "selection 'some' is unknown"),
        (("--max-tokens", "512"), "max_model_len .512. leaves no room"),
        (("--judge", "reward:/no/such/dir"), "/no/such/dir is not a directory. Give a local directory: --judge reward"),
        (("--eval-judge", "pairrm:./nowhere"), "./nowhere is not a directory"),
        (("--judge", "python:nowhere.py:score"), "nowhere.py"),
        (("--training", "tensor_model_parallel_size=2"), "1 ranks cannot be divided into model replicas of 2"),
        (("--training", "pipeline_model_parallel_size=2", "--training-processes", "3"), "3 ranks cannot be divided"),
        (("--training", "global_batch_size=7", "micro_batch_size=2"), r"global_batch_size .7. must be a multiple of"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_at_the_start(
    tmp_path: Path, tiny_llama_dir: Path, flags: tuple, message: str
) -> None:
    model = ("--model", str(tiny_llama_dir))
    with pytest.raises(ConfigError, match=message):
        check_stages(read(tmp_path, *model, *flags))


def test_a_hub_s_judge_and_ranks_that_a_launcher_starts_are_not_asked_for_at_the_start(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    launched = ("--training", "tensor_model_parallel_size=2", "--training-launcher", "srun torchrun")
    check_stages(read(tmp_path, "--model", str(tiny_llama_dir), "--judge", "pairrm:llm-blender/PairRM", *launched))


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--iterations", "0"), "iterations is 0"),
        (("--num-responses", "1"), "num_responses is 1"),
        (("--bootstrap-resamples", "100"), "at least 2000"),
        (
            ("--server", "http://a:1", "--rollout-options", "server_weights=trust"),
            "go on with the weights of the first",
        ),
        (("--rollout-launcher", "srun 'python"), "rollout_launcher is .*No closing quotation.*Write --rollout-launch"),
        (("--conversion-launcher", " "), "conversion_launcher is ' ', which holds no command"),
        (("--rollout-launcher", "a", "--rollout-command", "b"), "rollout_command and rollout_launcher are both set"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, flags: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--judge", "rules:cyclic"), r"scoring\.judge is rules:cyclic, but .* was begun with rules:concise"),
        (("--training", "lr=1e-5"), r"training\.lr is 1e-5, but .* was begun with 4e-5"),
        (("--training", "train_iters=9"), r"training\.train_iters is 9, but .* was begun with not set"),
        (("--rollout-options", "max_model_len=600"), r"rollout\.max_model_len is 600, but .* was begun with 512"),
        (("--prompts-per-iteration", "disjoint"), r"run\.prompts_per_iteration is disjoint"),
        (("--iterations", "1"), r"run\.iterations is 1, but .* was begun with 2"),
    ],
)
def test_a_changed_setting_of_a_begun_run_is_named(tmp_path: Path, flags: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_unchanged(read(tmp_path), read(tmp_path, *flags), tmp_path / "out")


def test_a_setting_that_no_stage_has_used_may_be_corrected(tmp_path: Path) -> None:
    before, now = read(tmp_path, "--judge", "reward:a/typo"), read(tmp_path, "--training", "lr=1e-5")
    for unused, message in (((), "scoring.judge"), (("scoring.",), "training.lr"), (("training.",), "scoring.judge")):
        with pytest.raises(ConfigError, match=message):
            check_unchanged(before, now, tmp_path / "out", unused=unused)
    check_unchanged(before, now, tmp_path / "out", unused=("scoring.", "training."))


def test_where_a_run_is_computed_may_change_and_more_iterations_over_all_prompts_may_follow(tmp_path: Path) -> None:
    moved = ("--training-processes", "4", "--rollout-command", "own sampler", "--allow-no-signal")
    layout = ("--training", "tensor_model_parallel_size=2", "micro_batch_size=4", "sequence_parallel=true")
    changed = read(tmp_path, *moved, *layout, "--iterations", "5")
    check_unchanged(read(tmp_path), changed, tmp_path / "out")


def test_disjoint_parts_forbid_more_iterations(tmp_path: Path) -> None:
    disjoint = ("--prompts-per-iteration", "disjoint")
    with pytest.raises(ConfigError, match=r"run\.iterations is 3"):
        check_unchanged(read(tmp_path, *disjoint), read(tmp_path, *disjoint, "--iterations", "3"), tmp_path / "out")


def test_all_but_the_layout_decides() -> None:
    """What may change, by hand: a field that is added decides, or is marked and stands here."""
    free = {
        TrainingConfig: {
            *("load", "data", "save", "micro_batch_size", "packed_sequence_size", "tensor_model_parallel_size"),
            *("pipeline_model_parallel_size", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
            *("virtual_pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"),
            *("sequence_parallel", "async_save", "keep_last", "grace_seconds", "reference_piece_seconds", *TRACKING),
            *("reference", "load_adapter", "check_replicas", "watchdog_seconds"),
        },
        GenerateConfig: {
            *("model", "adapter"),
            "prompts",
            "output",
            "allow_no_signal",
            "tensor_parallel_size",
            "server",
            "server_weights",
            *("workers", "ray", "worker_timeout"),
        },
        ScoreConfig: {"output", "rollouts", "allow_no_signal", "workers", "ray", "worker_timeout"},
        SelfPlayConfig: {
            *("model", "prompts", "output", "training_processes", "rollout_command", *LAUNCHERS),
            *("rollout_tensor_parallel_size", "server", "allow_no_signal", "inspected_prompts", "keep_last", *TRACKING),
            *("workers", "ray", "worker_timeout", "keep_engine"),
        },
    }
    kinds: dict[type, Any] = {
        TrainingConfig: read_training(),
        GenerateConfig: GenerateConfig(model=Path(), prompts=Path(), output=Path(), num_responses=2, max_tokens=1),
        ScoreConfig: ScoreConfig(output=Path("x"), rollouts=Path(), judge="rules:concise"),
        SelfPlayConfig: parse(
            SelfPlayConfig,
            name="self_play.py",
            description="",
            argv=["--model=m", "--prompts=p", "--output=o", "--judge=rules:concise", "--training", "lr=1e-6"],
        ),
    }
    for kind, names in free.items():
        deciding_names = {path.rpartition(".")[2] for path in deciding(kinds[kind]) if not path.startswith(OWN)}
        assert leaf_names(kinds[kind]) - deciding_names == names


TRACKING = {field.name for field in dataclasses.fields(TrackingConfig)}
OWN = ("training.", "rollout.rollout_options.", "scoring.scoring_options.")
"""Of other commands, which have their own entry."""


def read_training() -> TrainingConfig:
    argv = ["--load=a", "--data=b", "--save=c", "--lr=1e-6"]
    return parse(TrainingConfig, name="pretrain_sppo.py", description="", argv=argv)


def leaf_names(config: Any) -> set[str]:
    """List the settings of a config, those of other commands left to them."""
    names: set[str] = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (TrainingConfig, GenerateConfig, ScoreConfig)):
            continue
        names |= leaf_names(value) if dataclasses.is_dataclass(value) else {field.name}
    return names


def test_a_run_s_record_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    config = read(tmp_path, "--training", "lr=5.0e-7", "--scoring-options", "one_order=true")
    kept = json.loads(json.dumps(record(config)))
    assert read_record(kept, place=tmp_path / "state.json") == config
    assert "save" not in kept["training"] and kept["training"]["optimization"]["lr"] == 5e-7


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    """state.json then held `json`, the texts of the YAML file, and of a stage's options only those that were given."""
    config = read(tmp_path)
    before = json.loads(json.dumps(record(config)))
    before["training"] = {"lr": "4.0e-5", "optimizer": "adam", "optimization": {"lr_warmup_iters": "2"}}
    before["training"] |= {"transformer_config": ["a=1", "b=2"], "train_iters": None}
    before["rollout"]["rollout_options"] = {"max_model_len": "512", "enforce_eager": "true"}
    before["scoring"]["scoring_options"] = {}
    before["json"] = False
    old = read_record(before, place=tmp_path / "state.json")
    check_unchanged(old, config, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"training\.eta is 10.0, but .* was begun with 1000.0"):
        check_unchanged(old, read(tmp_path, "--training", "eta=10"), tmp_path / "out")


def test_a_shard_size_that_an_earlier_version_recorded_need_not_be_given(tmp_path: Path) -> None:
    """Its default was 64, and state.json has it; what is given must be it."""
    before = json.loads(json.dumps(record(read(tmp_path))))
    before["rollout"]["rollout_options"]["shard_size"] = 64
    old = read_record(before, place=tmp_path / "state.json")
    check_unchanged(old, read(tmp_path), tmp_path / "out")
    given = ("--rollout-options", "max_model_len=512", "enforce_eager=true")
    check_unchanged(old, read(tmp_path, *given, "shard_size=64"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"rollout\.shard_size is 128, but .* was begun with 64"):
        check_unchanged(old, read(tmp_path, *given, "shard_size=128"), tmp_path / "out")


def test_the_second_iteration_starts_from_the_first_s_model(tmp_path: Path) -> None:
    config = read(tmp_path, "--training-processes", "2")
    out = tmp_path / "out"
    stages = {stage.name: stage for stage in iteration_stages(config, RunPaths(run_dir=out), 2, evaluates=True)}
    assert list(stages) == [
        *("iter_2-rollouts", "iter_2-dataset", "iter_2-train", "iter_2-inspect", "iter_2-export"),
        *("iter_2-eval-rollouts", "iter_2-eval"),
    ]
    rollouts, train = stages["iter_2-rollouts"].command, stages["iter_2-train"].command
    assert rollouts[rollouts.index("--model") + 1] == str(out / "iter_1" / "hf")
    assert train[train.index("--load") + 1] == str(out / "iter_1" / "checkpoint")
    assert train[1:4] == ("-P", "-m", "torch.distributed.run")  # -P: not from the current directory
    assert train[train.index("--nproc-per-node") + 1] == "2"
    inspection = stages["iter_2-inspect"].command
    assert inspection[inspection.index("--load") + 1] == str(out / "iter_2" / "checkpoint")
    assert inspection[inspection.index("--reference") + 1] == str(out / "iter_1" / "checkpoint")
    assert inspection[:6] == train[:6]  # started as training is
    evaluation = stages["iter_2-eval"].command
    assert evaluation[evaluation.index("--previous") + 1] == str(out / "iter_1" / "eval" / "rollouts")
    assert evaluation[evaluation.index("--base") + 1] == str(out / "base_eval" / "rollouts")


def test_nothing_is_inspected_where_no_prompts_are(tmp_path: Path) -> None:
    config = read(tmp_path, "--inspected-prompts", "0")
    stages = iteration_stages(config, RunPaths(run_dir=tmp_path / "out"), 1, evaluates=False)
    assert [stage.name for stage in stages] == ["iter_1-rollouts", "iter_1-dataset", "iter_1-train", "iter_1-export"]


def references(config: SelfPlayConfig, iteration: int) -> dict[str, tuple[list[str], list[str], str]]:
    """Read the training stages of an iteration -> {stage: (references, their weights, what it saves)}, paths within."""
    run_dir = config.run.output
    found = {}
    for stage in iteration_stages(config, RunPaths(run_dir=run_dir), iteration, evaluates=False):
        if "train" in stage.name:
            training = as_the_stage_reads(TrainingConfig, stage.command)
            assert training.load == RunPaths(run_dir=run_dir).checkpoint(iteration - 1)
            assert set(stage.inputs) == {training.load, training.data, *training.reference}
            within = [str(path.relative_to(run_dir)) for path in (*training.reference, training.save)]
            found[stage.name] = (within[:-1], list(training.objective.reference_weights), within[-1])
    return found


@pytest.mark.parametrize("objective", ["inpo", "nash_md", "rspo"])
def test_the_start_model_is_the_fixed_reference_of_every_iteration(objective: str, tmp_path: Path) -> None:
    config = read(tmp_path, "--training", f"objective={objective}", "micro_batch_size=2")
    for iteration in (1, 3):
        name = f"iter_{iteration}"
        assert references(config, iteration) == {f"{name}-train": (["base"], [], f"{name}/checkpoint")}


def test_mnpo_mixes_the_policies_of_the_last_iterations_as_far_as_there_are_any(tmp_path: Path) -> None:
    weights = "reference_weights=[0.5, 0.25]"
    config = read(tmp_path, "--past-policies", "2", "--training", "objective=mnpo", "micro_batch_size=2", weights)
    of = [references(config, iteration)[f"iter_{iteration}-train"][:2] for iteration in (1, 2, 3, 4)]
    assert of == [
        ([], []),
        (["base"], [0.5]),
        (["iter_1/checkpoint", "base"], [0.5, 0.25]),
        (["iter_2/checkpoint", "iter_1/checkpoint"], [0.5, 0.25]),
    ]


def test_onpo_trains_its_auxiliary_policy_first_and_takes_the_step_from_it(tmp_path: Path) -> None:
    config = read(tmp_path, "--training", "objective=onpo", "micro_batch_size=2")
    assert references(config, 1) == {
        "iter_1-train-auxiliary": (["base"], [], "iter_1/auxiliary"),
        "iter_1-train": (["iter_1/auxiliary"], [], "iter_1/checkpoint"),
    }
    assert references(config, 2) == {
        "iter_2-train-auxiliary": (["iter_1/auxiliary"], [], "iter_2/auxiliary"),
        "iter_2-train": (["iter_2/auxiliary"], [], "iter_2/checkpoint"),
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--training", "objective=mnpo", "reference_weights=[0.5]"),
            "1 reference_weights are given for past_policies 2",
        ),
        (("--keep-last", "2", "--training", "objective=mnpo"), "Use --keep-last 3, or a smaller --past-policies"),
        (("--training", "objective=inpo", "reference=[there]"), "training sets reference, which self-play decides"),
        (("--training", "objective=sppo", "reference_weights=[0.5]"), "Leave --reference-weights out"),
        (("--training", "objective=inpo", "reference_weights=[0.5, 0.1]"), "2 reference_weights, 0.6 in all"),
    ],
    ids=str,
)
def test_references_that_self_play_cannot_give_are_refused_at_the_start(
    tmp_path: Path, flags: tuple, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stages(read(tmp_path, *flags, "micro_batch_size=2"))
