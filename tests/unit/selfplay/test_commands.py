"""Proves which commands a run with LoRA adapters consists of, and that all that a user adds is a rank.

That they run: tests/e2e/test_self_play_adapters.py.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_sppo import config as config_files
from megatron_sppo.errors import ConfigError
from megatron_sppo.selfplay.commands import iteration_stages, start_stages
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.selfplay.paths import RunPaths
from megatron_sppo.selfplay.stages import Stage

RUN = Path("run")


def config(training: dict[str, Any], **run: Any) -> SelfPlayConfig:
    sections = {
        "run": {"model": "start", "prompts": ["prompts.jsonl"], "output": str(RUN), "iterations": 3, **run},
        "scoring": {"judge": "rules:concise"},
        "training": {"lr": 1e-4, "micro_batch_size": 2, "global_batch_size": 4, **training},
    }
    return config_files.from_dict(SelfPlayConfig, sections, place="a test")


def stages(settings: SelfPlayConfig, iteration: int) -> dict[str, Stage]:
    listed = iteration_stages(settings, RunPaths(run_dir=RUN), iteration, evaluates=True)
    return {stage.name.removeprefix(f"iter_{iteration}-"): stage for stage in listed}


def flags(stage: Stage) -> dict[str, str]:
    """Read a command's flags -> {flag: the value behind it}."""
    words = stage.command
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}


def test_iterations_go_on_with_one_adapter_on_the_start_model() -> None:
    settings = config({"lora_rank": 16})
    first, second = stages(settings, 1), stages(settings, 2)
    assert "--adapter" not in first["rollouts"].command
    assert flags(first["train"])["--lora-rank"] == "16"
    assert "--load-adapter" not in first["train"].command
    assert flags(first["export"]) == {
        **flags(first["export"]),
        "--megatron": "run/iter_1/checkpoint",
        "--adapter": "run/iter_1/adapter",
        "--base": "start",
    }
    for name in ("rollouts", "eval-rollouts"):
        stage = second["rollouts"] if name == "rollouts" else first[name]
        assert (flags(stage)["--model"], flags(stage)["--adapter"]) == ("start", "run/iter_1/adapter")
        assert Path("run/iter_1/adapter") in stage.inputs
    train = flags(second["train"])
    assert (train["--load"], train["--load-adapter"]) == ("run/base", "run/iter_1/checkpoint")
    assert {Path("run/base"), Path("run/iter_1/checkpoint")} <= {*second["train"].inputs}
    inspect = flags(second["inspect"])
    assert (inspect["--load"], inspect["--load-adapter"]) == ("run/base", "run/iter_2/checkpoint")
    assert inspect["--reference"] == "run/iter_1/checkpoint"
    assert "import" not in second


def test_merged_each_iteration_the_next_begins_with_a_new_adapter_on_the_merged_model() -> None:
    settings = config({"lora_rank": 8}, lora_merge_each_iteration=True)
    second, third = stages(settings, 2), stages(settings, 3)
    export = second["export"]
    assert "--merge" in export.command and flags(export)["--base"] == "run/iter_1/hf"
    assert {Path("run/iter_1/hf"), Path("run/iter_2/checkpoint")} == {*export.inputs}
    assert flags(second["import"])["--megatron"] == "run/iter_2/merged"
    assert (flags(third["train"])["--load"], "--load-adapter" in third["train"].command) == ("run/iter_2/merged", False)
    assert (flags(third["rollouts"])["--model"], "--adapter" in third["rollouts"].command) == ("run/iter_2/hf", False)
    inspect = flags(third["inspect"])
    assert (inspect["--load"], inspect["--load-adapter"]) == ("run/iter_2/merged", "run/iter_3/checkpoint")
    assert inspect["--reference"] == "run/iter_2/merged"


def test_all_engines_of_a_run_have_room_for_its_adapters_so_that_one_can_serve_them_all() -> None:
    settings = config({"lora_rank": 16, "lora_targets": ["q_proj", "v_proj"]})
    started = [*start_stages(settings, RunPaths(run_dir=RUN), evaluates=True)][-1]
    for stage in (started, stages(settings, 1)["rollouts"], stages(settings, 2)["eval-rollouts"]):
        assert flags(stage)["--max-lora-rank"] == "16"
        place = stage.command.index("--lora-target-modules")
        assert stage.command[place + 1 : place + 3] == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("training", "run", "keeps"),
    [
        ({"lora_rank": 16}, {}, True),
        ({"lora_rank": 16}, {"workers": 1}, True),
        ({"lora_rank": 16}, {"workers": 2}, False),
        ({"lora_rank": 16}, {"ray": "auto"}, False),
        ({"lora_rank": 16}, {"rollout_launcher": "srun python"}, False),
        ({"lora_rank": 16}, {"lora_merge_each_iteration": True}, False),
        ({"lora_rank": 16}, {"keep_engine": False}, False),
        ({}, {}, False),
    ],
)
def test_an_engine_is_kept_where_one_on_this_machine_can_serve_all_stages(
    training: dict[str, Any], run: dict[str, Any], keeps: bool
) -> None:
    assert config(training, **run).keeps_engine is keeps


def test_without_a_rank_nothing_of_adapters_is_said() -> None:
    settings = config({})
    listed = [*start_stages(settings, RunPaths(run_dir=RUN), evaluates=True), *stages(settings, 2).values()]
    for stage in listed:
        assert not [word for word in stage.command if "adapter" in word or "lora" in word or "merge" in word]
    assert flags(stages(settings, 2)["export"])["--template"] == "start"


@pytest.mark.parametrize("objective", ["mnpo", "inpo", "onpo"])
def test_further_references_are_adapters_on_the_same_model(objective: str) -> None:
    third = stages(config({"lora_rank": 4, "objective": objective}), 3)
    expected = {"mnpo": ("run/iter_1/checkpoint", "run/base"), "inpo": ("run/base",), "onpo": ("run/iter_3/auxiliary",)}
    words = third["train"].command
    assert words[words.index("--reference") + 1 :][: len(expected[objective])] == expected[objective]


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "merged without adapters": ({}, {"lora_merge_each_iteration": True}, "Use --training lora_rank=16"),
    "beyond vLLM's room": ({"lora_rank": 600}, {}, "512 at most. Use --training lora_rank=512, or --lora-merge"),
    "an adapter of the user's": ({"lora_rank": 4, "load_adapter": "x"}, {}, "load_adapter, which self-play decides"),
    "a sampler of the user's": ({"lora_rank": 4}, {"rollout_command": "my-sampler"}, "Use --lora-merge-each-iteration"),
    "two adapters, merged": (
        {"lora_rank": 4, "objective": "onpo"},
        {"lora_merge_each_iteration": True},
        "objective onpo goes on with two adapters",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_settings_that_do_not_go_together_are_refused_at_the_start(kind: str) -> None:
    training, run, message = BAD[kind]
    with pytest.raises(ConfigError, match=message):
        config(training, **run)
