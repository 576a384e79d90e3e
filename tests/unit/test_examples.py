"""Proves that every example configuration is one that the tools take, and that both published recipes are as claimed.

Values are those of the paper and of the authors' code, written down here by hand. No recipe is run.
"""

from pathlib import Path

import pytest

from megatron_sppo import config
from megatron_sppo.planning.config import read_plan
from megatron_sppo.planning.plan import make_report
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.training.config import TrainingConfig

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs"
SELF_PLAY = ("mistral_7b_paper", "llama3_8b_official", "gemma2_9b_official", "smollm2_demo")
PATHS = ["--load", "a", "--data", "b", "--save", "c"]


def self_play_config(name: str) -> SelfPlayConfig:
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--model", "m", "--prompts", "p", "--output", "o"]
    return config.parse(SelfPlayConfig, name="self_play.py", description="", argv=argv)


def training_config(*argv: str) -> TrainingConfig:
    return config.parse(TrainingConfig, name="pretrain_sppo.py", description="", argv=[*PATHS, *argv])


def training_of(name: str) -> TrainingConfig:
    return self_play_config(name).training


def test_every_configuration_is_covered_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*SELF_PLAY, "llama3_70b_h100", "llama3_70b_lora_8h100"}


@pytest.mark.parametrize("name", SELF_PLAY)
def test_a_self_play_configuration_is_taken_by_the_loop_and_by_training(name):
    assert self_play_config(name).run.iterations >= 2
    assert training_of(name).optimization.lr > 0


def test_the_two_published_recipes_differ_where_the_sources_do():
    paper, official = self_play_config("mistral_7b_paper"), self_play_config("llama3_8b_official")
    assert (paper.rollout.temperature, paper.rollout.top_p) == (1.0, 1.0)
    assert (official.rollout.temperature, official.rollout.top_p) == (0.7, 0.9)
    assert (paper.scoring.preset, official.scoring.preset) == ("paper", "official")
    for run in (paper, official):
        assert (run.run.iterations, run.rollout.num_responses, run.run.prompts_per_iteration) == (3, 5, "disjoint")
        assert (run.scoring.selection, run.scoring.judge) == ("extremes", "pairrm:llm-blender/PairRM")
    paper_training, official_training = training_of("mistral_7b_paper"), training_of("llama3_8b_official")
    for training in (paper_training, official_training):
        optimization = training.optimization
        assert (training.objective.objective, training.objective.eta, training.objective.baseline) == (
            "sppo",
            1000,
            "half",
        )
        assert (optimization.lr, optimization.lr_decay_style, optimization.lr_warmup_fraction) == (5e-7, "linear", 0.1)
        assert (training.batch.global_batch_size, training.batch.num_epochs) == (128, 1)
    steps_of_18_epochs = 18 * 20_000 / 64
    assert paper_training.optimization.lr_decay_iters == steps_of_18_epochs
    optimization = official_training.optimization
    assert (optimization.optimizer, optimization.rmsprop_alpha, optimization.adam_eps) == ("rmsprop", 0.99, 1e-8)
    assert (optimization.weight_decay, optimization.lr_decay_iters) == (0.0, None)
    assert (official_training.batch.max_prompt_length, official_training.batch.seq_length) == (512, 1024)


def test_the_authors_third_model_has_the_recipe_of_their_second():
    gemma, llama = self_play_config("gemma2_9b_official"), self_play_config("llama3_8b_official")
    for section in ("run", "rollout", "scoring", "evaluation", "training"):
        assert getattr(gemma, section) == getattr(llama, section)


def test_the_70b_configuration_of_adapters_fits_eight_gpus_in_fp8_and_in_bfloat16():
    """70.55 billion weights of 2 bytes over 8 ranks, as much in FP8 both ways, and all else below 20 GB."""
    path = CONFIGS / "llama3_70b_lora_8h100.yaml"
    for flags, num_copies in ((), 1), (("--fp8", "none"), 0):
        config, _ = read_plan(["--config", str(path), *flags], name="plan", description="")
        (plan,) = make_report(config, config_file=path).plans
        assert (plan.world_size, plan.fits) == (8, True)
        memory = plan.fullest
        assert memory.weights == pytest.approx(2 * 70.55e9 / 8, rel=1e-3)
        assert memory.fp8_weights == pytest.approx(num_copies * 2 * 68.45e9 / 8, rel=1e-3)  # the layers' matrices
        assert memory.total - memory.weights - memory.fp8_weights < 20e9
        # Rank 16 on seven modules of 80 layers, as PEFT counts them; whole A or B on every rank.
        inputs, outputs = (6 * 8192 + 28672), (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192)
        assert plan.files.checkpoint_bytes == 80 * 16 * (inputs + outputs) * 14
        assert memory.optimizer == pytest.approx(6 * memory.adapters, rel=0.01)


def test_the_70b_configuration_fits_32_and_64_gpus():
    training = training_config("--config", str(CONFIGS / "llama3_70b_h100.yaml"))
    assert training.parallel.model_parallel_size == 32
    assert (training.model.fp8, training.model.fp8_recipe) == ("hybrid", "tensorwise")
    for gpus in (32, 64):
        training.check_batch(data_parallel_size=gpus // training.parallel.model_parallel_size)
