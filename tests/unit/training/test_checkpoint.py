"""One loader for checkpoints of both layer specs: what only one of them saves is let off, and it is never a weight.

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
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.policy import mcore_config, weights_hash
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


def test_verification_loads_by_it(converted: Path, _norms_with_a_state: None, tmp_path: Path) -> None:
    shutil.copytree(converted / "megatron", tmp_path / "megatron")
    assert verify(converted / "hf", tmp_path / "megatron", dtype="float32", layerwise=False)["faults"] == []
