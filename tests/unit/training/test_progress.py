"""What a resumed training run must share with its beginning, and that checkpoints of earlier versions tell it too."""

from pathlib import Path

import pytest

from megatron_sppo.config import LAYOUT, TUNABLE, deciding
from megatron_sppo.errors import ConfigError
from megatron_sppo.training.config import OptimizationConfig, TrainingConfig
from megatron_sppo.training.progress import Progress

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
