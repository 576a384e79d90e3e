"""Proves: what we write is what Megatron-Core's own GPTModel asks for, in every layout; what it saves, we export.

The truth is the Hugging Face files themselves: after import, load by the host, save by the host in another layout and
export, every tensor must come back bit for bit. Megatron-Core reads and writes; nothing of ours is between.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sppo.checkpoints.distcp import check_metadata
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.model_file import read_architecture
from tests.distributed.harness import run_ranks
from tests.models import MIXTURES, tiny_llama
from tests.sharded_saves import save_by_megatron_core


def load_and_save(source: str, target: str, tensor: int, pipeline: int, with_optimizer: bool, expert: int) -> list[str]:
    """Build the policy's stage on this rank, load `source` with mcore, save it with mcore -> its parameter names."""
    from megatron.core import dist_checkpointing

    from megatron_sppo.model.config import ModelConfig
    from megatron_sppo.training import parallel
    from megatron_sppo.training.config import ParallelConfig
    from megatron_sppo.training.policy import build_policy

    architecture, _ = read_architecture(Path(source))
    layout = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        sequence_parallel=tensor > 1 and architecture.num_moe_experts is not None,
    )
    parallel.initialize(layout, seed=1)
    policy = build_policy(architecture, ModelConfig(params_dtype="float32", transformer_impl="torch"), layout)
    stage = policy.stages[0]
    for parameter in stage.parameters():
        parameter.data.fill_(float("nan"))  # what is not loaded stays visible
    loaded = dist_checkpointing.load({"model": stage.sharded_state_dict()}, source)
    stage.load_state_dict(loaded["model"])
    state: dict[str, Any] = {"model": stage.sharded_state_dict(), "iteration": 3}
    if with_optimizer:
        state["optimizer"] = {
            name: _momentum(tensor)
            for name, tensor in stage.sharded_state_dict().items()
            if type(tensor).__name__ == "ShardedTensor"
        }
    if parallel.is_rank_zero():
        Path(target).mkdir(parents=True)
    torch.distributed.barrier()
    save_by_megatron_core(state, Path(target))
    names = [name for name, _ in stage.named_parameters()]
    parallel.shut_down()
    return names


def _momentum(tensor: Any) -> Any:
    import dataclasses

    return dataclasses.replace(tensor, key=f"optimizer.state.exp_avg.{tensor.key}", data=torch.ones_like(tensor.data))


MODELS = {
    "untied grouped, odd vocabulary": {},
    "tied, one key/value head for all": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "no grouping, wide heads": {"num_key_value_heads": 8, "head_dim": 16},
    "qwen2, biases": {"model_type": "qwen2"},
    "qwen3, norms of heads": {"model_type": "qwen3", "tie_word_embeddings": True},
    **MIXTURES,
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_the_host_loads_an_import_and_its_save_exports_to_the_same_tensors(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    round_trip(tmp_path, overrides, tensor=1, pipeline=1)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_the_host_loads_and_saves_under_any_layout(tmp_path: Path, tensor: int, pipeline: int) -> None:
    round_trip(tmp_path, {}, tensor=tensor, pipeline=pipeline, with_optimizer=True)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_survive_tensor_parallelism(tmp_path: Path, family: str) -> None:
    round_trip(tmp_path, {"model_type": family}, tensor=2, pipeline=1)


@pytest.mark.parametrize(("tensor", "pipeline", "expert"), [(2, 1, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 4)])
def test_experts_are_loaded_and_saved_under_any_layout(tmp_path: Path, tensor: int, pipeline: int, expert: int) -> None:
    ranks = pipeline * max(tensor, expert)
    settings = {"with_optimizer": True, "expert": expert, "world_size": ranks}
    round_trip(tmp_path, MIXTURES["qwen3_moe"], tensor=tensor, pipeline=pipeline, **settings)


def test_a_tied_embedding_reaches_both_pipeline_ends(tmp_path: Path) -> None:
    round_trip(tmp_path, {"tie_word_embeddings": True}, tensor=2, pipeline=2)


def round_trip(
    tmp_path: Path,
    overrides: dict[str, Any],
    *,
    tensor: int,
    pipeline: int,
    with_optimizer: bool = False,
    expert: int = 1,
    world_size: int | None = None,
) -> None:
    """Import, load and save by the host's ranks, export; compare with the original files."""
    hf = tiny_llama(tmp_path / "hf", num_hidden_layers=4, **overrides)
    source = import_checkpoint(hf, tmp_path / "megatron")
    saved = tmp_path / "trained" / "iter_0000003"
    ranks = world_size or tensor * pipeline
    names = run_ranks(load_and_save, ranks, str(source), str(saved), tensor, pipeline, with_optimizer, expert)
    assert len({name for rank in names for name in rank}) > 10
    check_metadata(saved)
    exported = export_checkpoint(saved, tmp_path / "out", template=hf)
    original, result = load_file(hf / "model.safetensors"), load_file(exported / "model.safetensors")
    assert set(original) == set(result)
    for name, expected in original.items():
        assert torch.equal(result[name], expected), name
