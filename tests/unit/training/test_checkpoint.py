"""One loader for checkpoints of both layer specs: what only one of them saves is let off, and it is never a weight.
And of an optimizer's state what the command line decides is not the checkpoint's.

Norms of our own are given the empty state that Transformer Engine's save where they stand alone. Round trips of the
real ones are in tests/unit/model/test_transformer_engine_spec.py, and training's saves in tests/distributed.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import PolicyModel, build_stage
from megatron_sppo.model.normalization import RMSNorm
from megatron_sppo.model_file import read_architecture
from megatron_sppo.training import checkpoint, parallel
from megatron_sppo.training.config import OptimizationConfig, ParallelConfig
from megatron_sppo.training.optimizer import allocate_state, build_optimizer, build_scheduler
from megatron_sppo.training.policy import build_policy, mcore_config, weights_hash
from megatron_sppo.training.progress import Progress
from megatron_sppo.training.saving import Saver
from megatron_sppo.verification.verify import verify
from tests.families import family_model
from tests.sharded_saves import save_as_a_run


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMo-2, whose norms all stand alone, in both forms."""
    root = tmp_path_factory.mktemp("olmo2")
    import_checkpoint(family_model(root / "hf", "olmo2"), root / "megatron")
    return root


@pytest.fixture
def _norms_with_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RMSNorm, "get_extra_state", lambda self: torch.empty(0, dtype=torch.uint8), raising=False)
    monkeypatch.setattr(RMSNorm, "set_extra_state", lambda self, state: None, raising=False)


@pytest.fixture
def _one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.shut_down()


def build(checkpoint_directory: Path) -> PolicyModel:
    architecture, _ = read_architecture(checkpoint_directory)
    model = ModelConfig(params_dtype="float32", transformer_impl="torch")
    config = mcore_config(architecture, model, ParallelConfig())
    return build_stage(architecture, config, model, pre_process=True, post_process=True)


def test_states_that_only_one_spec_saves_are_let_off_either_way(
    converted: Path, tmp_path: Path, _one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = converted / "megatron/iter_0000000"
    plain, fresh = build(source), build(source)
    checkpoint.load_stages((plain,), source)
    monkeypatch.setattr(RMSNorm, "get_extra_state", lambda self: torch.empty(0, dtype=torch.uint8), raising=False)
    monkeypatch.setattr(RMSNorm, "set_extra_state", lambda self, state: None, raising=False)
    with_states = build(source)
    checkpoint.load_stages((with_states,), source)
    saved = tmp_path / "saved"
    saved.mkdir()
    state = checkpoint.describe_model((with_states,))
    assert any("final_layernorm._extra_state" in name for name in state["model"])
    save_as_a_run(state, saved)
    monkeypatch.undo()
    checkpoint.load_stages((fresh,), saved)
    assert weights_hash((fresh,)) == weights_hash((with_states,)) == weights_hash((plain,))


def test_a_weight_is_never_let_off(converted: Path, _one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = converted / "megatron/iter_0000000"
    stage: Any = build(source)
    stage.decoder.final_layernorm.gain = torch.nn.Parameter(torch.ones(3))  # under a name that no checkpoint has
    with pytest.raises(ConfigError, match=r"does not hold this model: .*final_layernorm\.gain"):
        checkpoint.load_stages((stage,), source)


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("before", "now", "betas"),
    [
        ({"adam_beta1": 0.8, "adam_beta2": 0.95}, {"adam_beta1": 0.0, "adam_beta2": 0.5}, (0.0, 0.5)),
        ({"optimizer": "rmsprop"}, {"optimizer": "rmsprop", "rmsprop_alpha": 0.5}, (0.9, 0.5)),
    ],
    ids=["adam", "rmsprop"],
)
def test_rates_and_decays_of_a_run_that_goes_on_are_the_command_line_s(
    converted: Path, tmp_path: Path, _one_rank: None, before: dict, now: dict, betas: tuple, shards: bool, params_dtype
) -> None:
    """Those of every parameter group; moments and step counts are the checkpoint's."""
    source = converted / "megatron/iter_0000000"
    layout, model = ParallelConfig(use_distributed_optimizer=shards), ModelConfig(params_dtype=params_dtype)
    architecture, _ = read_architecture(source)

    def begin(**settings: Any) -> tuple[Any, ...]:
        policy = build_policy(architecture, model, layout)
        checkpoint.load_weights(policy, source)
        config = OptimizationConfig(lr_decay_style="constant", weight_decay=0.0, **settings)
        optimizer = build_optimizer(policy.chunks, config, model, layout)
        return policy, optimizer, build_scheduler(optimizer, config, train_iters=4)

    first = begin(lr=1e-3, **before)
    allocate_state(first[1])
    for part in first[1].chained_optimizers:
        for state in part.optimizer.state.values():
            state["exp_avg_sq"].fill_(3.0)
            state["step"] += 7
    Saver(tmp_path / "save", *first, progress=Progress(step=1), source=source).save(wait=True)
    policy, optimizer, scheduler = begin(lr=1e-4, min_lr=1e-5, adam_eps=0.1, **now)
    checkpoint.resume(tmp_path / "save/iter_0000001", policy, optimizer, scheduler)
    assert len(optimizer.param_groups) > 1
    for group in optimizer.param_groups:
        assert {"betas": betas, "eps": 0.1, "lr": 1e-4, "max_lr": 1e-4, "min_lr": 1e-5}.items() <= group.items()
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            assert state["exp_avg_sq"].eq(3.0).all() and state["step"] == 7


def test_verification_loads_by_it(converted: Path, _norms_with_a_state: None, tmp_path: Path) -> None:
    shutil.copytree(converted / "megatron", tmp_path / "megatron")
    assert verify(converted / "hf", tmp_path / "megatron", dtype="float32", layerwise=False)["faults"] == []
