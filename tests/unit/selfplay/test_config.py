"""Proves: one YAML file makes a run's settings, training's reach training unchanged, and a begun run keeps its own."""

from pathlib import Path

import pytest
import yaml

from megatron_sppo.config import parse
from megatron_sppo.errors import ConfigError
from megatron_sppo.selfplay.commands import (
    RunPaths,
    check_rollouts_and_judges,
    check_training_settings,
    iteration_stages,
)
from megatron_sppo.selfplay.config import SelfPlayConfig, check_unchanged, named_values, option_flags, record

YAML = """
run: {iterations: 2, prompts_per_iteration: all}
scoring: {judge: rules:concise}
rollout:
  num_responses: 4
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


def test_training_settings_arrive_as_they_were_written(tmp_path: Path) -> None:
    assert named_values(read(tmp_path).training, place="training") == {
        "lr": "4e-5",
        "optimizer": "adam",
        "optimization": {"lr_warmup_iters": "2"},
        "transformer_config": ["a=1", "b=2"],
        "train_iters": None,
    }


def test_a_typed_section_replaces_the_file_s_and_says_what_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read(tmp_path, "--training", "lr=1e-7", "eta=5")
    assert named_values(config.training, place="training") == {"lr": "1e-7", "eta": "5"}
    assert "--training replaces what" in caplog.text
    assert "optimizer, optimization, transformer_config, train_iters no longer set" in caplog.text


def test_options_become_flags_of_the_tool(tmp_path: Path) -> None:
    flags = option_flags(read(tmp_path).rollout.rollout_options, place="rollout_options")
    assert flags == ["--max-model-len=512", "--enforce-eager"]


def test_settings_of_the_judge_hold_in_training_and_in_evaluation(tmp_path: Path) -> None:
    flags = ("--judge-after", "</think>", "--verdict-tokens", "512", "--allow-no-signal")
    for given in ((), flags):
        config = read(tmp_path, *given)
        stages = iteration_stages(config, RunPaths(run_dir=tmp_path / "out"), 1, evaluates=True)
        commands = {stage.name: stage.command for stage in stages}
        for name in ("iter_1-dataset", "iter_1-eval"):
            assert tuple(token for token in commands[name] if token in flags) == given


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training holds 'lr'. Write NAME=VALUE"):
        named_values(["lr"], place="training")


def test_training_s_own_reader_accepts_good_settings_and_names_a_wrong_key(tmp_path: Path) -> None:
    good = read(tmp_path, "--training", "lr=4e-5", "eta=10", "train_iters=None", "lr_warmup_fraction=0.1")
    bad = read(tmp_path, "--training", "lr=4e-5", "etaa=10")
    for config, message in ((good, None), (bad, r"section training: unknown key 'etaa'")):
        file = tmp_path / "training.yaml"
        file.write_text(yaml.safe_dump(named_values(config.training, place="training")))
        if message is None:
            check_training_settings(config, file)
        else:
            with pytest.raises(ConfigError, match=message):
                check_training_settings(config, file)


def test_training_may_not_decide_where_it_reads_and_writes(tmp_path: Path) -> None:
    config = read(tmp_path, "--training", "lr=1e-5", "save=elsewhere")
    with pytest.raises(ConfigError, match="training sets save"):
        check_training_settings(config, tmp_path / "unread.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--judge", "rules:nice"), "rules:nice is unknown"),
        (("--judge", "matrices:m.jsonl"), "cannot judge new ones"),
        (("--eval-judge", "nice"), "'nice' is not a judge"),
        (("--temperature", "0"), "temperature is 0"),
        (("--top-p", "1.5"), "top_p is 1.5"),
        (("--selection", "some"), "selection 'some' is unknown"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_at_the_start(tmp_path: Path, flags: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rollouts_and_judges(read(tmp_path, *flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--iterations", "0"), "iterations is 0"),
        (("--num-responses", "1"), "num_responses is 1"),
        (("--bootstrap-resamples", "100"), "at least 2000"),
        (("--server", "http://localhost:8000"), "a server keeps the model"),
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
        (("--prompts-per-iteration", "disjoint"), r"run\.prompts_per_iteration is disjoint"),
        (("--iterations", "1"), r"run\.iterations is 1, but .* was begun with 2"),
    ],
)
def test_a_changed_setting_of_a_begun_run_is_named(tmp_path: Path, flags: tuple, message: str) -> None:
    before = record(read(tmp_path))
    with pytest.raises(ConfigError, match=message):
        check_unchanged(before, record(read(tmp_path, *flags)), tmp_path / "out")


def test_where_a_run_is_computed_may_change_and_more_iterations_over_all_prompts_may_follow(tmp_path: Path) -> None:
    before = record(read(tmp_path))
    moved = ("--training-processes", "4", "--rollout-command", "own sampler", "--allow-no-signal")
    changed = read(tmp_path, *moved, "--iterations", "5")
    check_unchanged(before, record(changed), tmp_path / "out")


def test_disjoint_parts_forbid_more_iterations(tmp_path: Path) -> None:
    disjoint = ("--prompts-per-iteration", "disjoint")
    before = record(read(tmp_path, *disjoint))
    with pytest.raises(ConfigError, match=r"run\.iterations is 3"):
        check_unchanged(before, record(read(tmp_path, *disjoint, "--iterations", "3")), tmp_path / "out")


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
    assert "torch.distributed.run" in train and train[train.index("--nproc-per-node") + 1] == "2"
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
