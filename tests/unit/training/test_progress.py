"""What a resumed training run must share with its beginning, and that checkpoints of earlier versions tell it too."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sppo.config import LAYOUT, TUNABLE, deciding
from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.training.config import BatchConfig, ObjectiveConfig, OptimizationConfig, TrainingConfig
from megatron_sppo.training.progress import Progress, resume_key

EARLIER = {
    "num_clipped": 2,
    "facts": {"dataset_hash": "abc", "seed": 5, "eta": 1000.0},
    "reference": {"weights_hash": "def"},
    "packs": {"micro_batch_size": 4, "packed_sequence_size": None},
    "ref_drift": {"9": 0.25},
}


def test_every_setting_is_marked_as_free_or_must_be_the_same() -> None:
    """A field that is added decides, and so changes this list, unless it is marked."""
    config = TrainingConfig(load=Path("a"), data=Path("b"), save=Path("c"), optimization=OptimizationConfig(lr=1e-6))
    assert set(deciding(config, free=(LAYOUT, TUNABLE))) == {
        "objective.objective",
        "objective.eta",
        "objective.beta",
        "objective.baseline",
        "objective.reference_weights",
        "objective.reverse_kl_weight",
        "objective.forward_kl_weight",
        "batch.global_batch_size",
        "batch.max_prompt_length",
        "batch.share_prompts",
        "batch.selection",
        "batch.seed",
        "optimization.optimizer",
        "model.params_dtype",
        "model.fp8",
        "model.fp8_recipe",
        "model.first_last_layers_bf16",
        "adapters.lora_rank",
        "adapters.lora_alpha",
        "adapters.lora_dropout",
        "adapters.lora_targets",
        "adapters.lora_scaling",
        "parallel.use_distributed_optimizer",
    }


def test_a_rate_may_change_on_resuming_and_decides_an_iteration_of_self_play() -> None:
    paths = {"load": Path("a"), "data": Path("b"), "save": Path("c")}
    one, other = (TrainingConfig(**paths, optimization=OptimizationConfig(lr=lr)) for lr in (1e-6, 1e-7))
    assert deciding(one, free=(LAYOUT, TUNABLE)) == deciding(other, free=(LAYOUT, TUNABLE))
    assert deciding(one) != deciding(other)


def settings_of(objective: ObjectiveConfig | None = None, **model: Any) -> dict[str, Any]:
    paths = {"load": Path("a"), "data": Path("b"), "save": Path("c")}
    config = TrainingConfig(
        **paths,
        optimization=OptimizationConfig(lr=1e-6),
        batch=BatchConfig(micro_batch_size=2),
        model=ModelConfig(**model),
        objective=objective or ObjectiveConfig(),
    )
    return resume_key(SimpleNamespace(row_key={}), config)


def test_another_precision_is_refused_and_one_that_was_not_recorded_is_taken_for_the_same() -> None:
    plain, tensorwise = settings_of(), settings_of(fp8="hybrid")
    for begun, now, words in (
        (plain, tensorwise, "fp8 was 'none', is 'hybrid'"),
        (tensorwise, plain, "fp8 was 'hybrid', is 'none'"),
        (tensorwise, settings_of(fp8="hybrid", fp8_recipe="delayed"), "fp8_recipe was 'tensorwise', is 'delayed'"),
        (tensorwise, settings_of(fp8="hybrid", first_last_layers_bf16=True), "first_last_layers_bf16 was False"),
    ):
        with pytest.raises(ConfigError, match=words):
            Progress(resume_key=begun).check_resumes(now, Path("save"))
    Progress(resume_key=plain).check_resumes(settings_of(fp8_recipe="delayed"), Path("save"))  # of no effect
    earlier = {name: value for name, value in plain.items() if name != "fp8"}
    for now in (plain, tensorwise):
        Progress(resume_key=earlier).check_resumes(now, Path("save"))


def test_an_eta_that_was_of_no_effect_does_not_keep_a_run_from_going_on() -> None:
    """Runs of dpo could be begun with any."""
    dpo = settings_of(ObjectiveConfig(objective="dpo"))
    Progress(resume_key={**dpo, "eta": 5.0}).check_resumes(dpo, Path("save"))
    with pytest.raises(ConfigError, match=r"eta was 5\.0, is 1000"):
        Progress(resume_key={**settings_of(), "eta": 5.0}).check_resumes(settings_of(), Path("save"))


def test_progress_is_stored_under_the_names_of_earlier_versions() -> None:
    progress = Progress.from_json(EARLIER, step=7)
    assert (progress.step, progress.num_clipped, progress.ref_drift) == (7, 2, {"9": 0.25})
    assert progress.resume_key == EARLIER["facts"] and progress.micro_batch_key == EARLIER["packs"]
    assert progress.to_json() == EARLIER


def test_progress_of_the_earliest_checkpoints_is_read() -> None:
    progress = Progress.from_json({"num_clipped": 0, "facts": {"seed": 5}, "reference": {}}, step=1)
    assert progress.resume_key == {"seed": 5} and progress.micro_batch_key == {} and progress.ref_drift == {}
    progress.warn_if_micro_batches_changed({"micro_batch_size": 4})


def test_other_settings_are_refused_with_both_values() -> None:
    progress = Progress.from_json(EARLIER, step=7)
    progress.check_resumes(dict(EARLIER["facts"]), Path("save"))
    with pytest.raises(ConfigError, match=r"save was trained with other settings: seed was 5, is 6\. Use the same"):
        progress.check_resumes({**EARLIER["facts"], "seed": 6}, Path("save"))
