"""Transformer Engine's layer spec beside torch's, without a GPU: same weights, same checkpoints, either way round.

Megatron-Core and Transformer Engine are told that there is a Hopper GPU, and the model is built on the CPU; nothing is
computed. What the layers compute is for tests/gpu. Runs wherever Transformer Engine can be imported.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")

from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints import megatron_checkpoint
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import PolicyModel, build_stage
from megatron_sppo.model.transformer_config import transformer_config
from megatron_sppo.training import checkpoint, parallel
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.policy import weights_hash
from tests.families import FAMILIES, family_model
from tests.sharded_saves import save_as_a_run
from tests.unit.planning.models import LATENTS, MIXTURE, TINY

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "norms of queries and keys": {"qk_layernorm": True},
    "bias": {"add_qkv_bias": True},
    "latent attention": LATENTS,
    "mixture": MIXTURE,
    "mixture with norms": {**MIXTURE, "qk_layernorm": True},
}
ALONE = ("final_layernorm", "q_layernorm", "k_layernorm", "pre_mlp_layernorm", "input_layernorm")
"""Norms of Transformer Engine that stand by themselves and save an (empty) state."""


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.shut_down()


@contextlib.contextmanager
def as_on_hopper() -> Iterator[None]:
    """Answer what is asked of CUDA while a model is built."""
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0, total_memory=80 << 30, name="H100")
    with contextlib.ExitStack() as stack:
        for name, answer in {
            "is_available": True,
            "current_device": 0,
            "get_device_capability": (9, 0),
            "get_device_properties": properties,
        }.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", return_value=answer))
        yield


def build(architecture: Architecture, implementation: str, **settings: Any) -> PolicyModel:
    model = ModelConfig(transformer_impl=implementation, **settings)
    with as_on_hopper() if implementation == "transformer_engine" else contextlib.nullcontext():
        config = transformer_config(architecture, model)
        config.use_cpu_initialization = True
        return build_stage(architecture, config, model, pre_process=True, post_process=True)


def sharded(model: PolicyModel) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """List what a checkpoint of the model holds -> ({key of a tensor: global shape}, keys of other objects)."""
    tensors, objects = {}, set()
    for value in model.sharded_state_dict().values():
        if isinstance(value, ShardedObject):
            objects.add(value.unique_key)
        else:
            tensors[value.key] = tuple(getattr(value, "global_shape", ()))
    return tensors, objects


@pytest.mark.parametrize("fp8", ["none", "hybrid"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_specs_shard_the_same_tensors_under_the_same_keys(name: str, fp8: str) -> None:
    architecture = dataclasses.replace(TINY, **ARCHITECTURES[name])
    torch_tensors, torch_objects = sharded(build(architecture, "torch"))
    engine_tensors, engine_objects = sharded(build(architecture, "transformer_engine", fp8=fp8))
    assert engine_tensors == torch_tensors
    assert torch_objects <= engine_objects
    assert all(any(f".{norm}._extra_state" in key for norm in ALONE) for key in engine_objects - torch_objects)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_checkpoint_loads_into_both_specs_and_a_trained_one_into_the_other(
    family: str, tmp_path: Path
) -> None:
    """Weights that both have under one name are compared bit for bit; norms are named after their place."""
    hf = family_model(tmp_path / "hf", family)
    import_checkpoint(hf, tmp_path / "megatron")
    source = megatron_checkpoint.resolve_checkpoint(tmp_path / "megatron")
    architecture = architecture_from_hf(read_config(hf))
    models = {name: build(architecture, name) for name in ("torch", "transformer_engine")}
    for model in models.values():
        checkpoint.load_stages((model,), source)
    assert_equal_weights(models)
    for giver, taker in (("torch", "transformer_engine"), ("transformer_engine", "torch")):
        saved = tmp_path / f"by_{giver}"
        saved.mkdir()
        save_as_a_run(checkpoint.describe_model((models[giver],)), saved)
        fresh = build(architecture, taker)
        checkpoint.load_stages((fresh,), saved)
        assert_equal_weights({giver: models[giver], taker: fresh})


def assert_equal_weights(models: dict[str, PolicyModel]) -> None:
    """Hold two models' weights against each other, and what identifies them."""
    assert len({weights_hash((model,)) for model in models.values()}) == 1
    first, second = ({_plain(name): p.detach() for name, p in m.named_parameters()} for m in models.values())
    common = set(first) & set(second)
    assert {name for name in set(first) ^ set(second) if ".experts." not in name} == set()
    for name in common:
        assert torch.equal(first[name], second[name]), name
    sums = [sum(float(p.double().sum()) for p in weights.values()) for weights in (first, second)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)  # experts' matrices too, which the two specs name apart


def _plain(name: str) -> str:
    """Name a norm by its own place, whichever spec's name it has."""
    for fused in ("self_attention.linear_qkv", "self_attention.in_proj"):
        name = name.replace(f"{fused}.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
