"""Proves: checkpoints of training, saved under any layout with optimizer state, export to the weights as trained.

The truth is the optimizer's float32 master weights, read by torch.distributed.checkpoint's own loader, rounded to
bfloat16 and cut into Hugging Face's tensors by the few lines below. The second half writes checkpoints as Megatron-LM
does (its state dict, its directories), by Megatron-Core's own save.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.errors import ConversionError
from megatron_sppo.model_file import read_architecture
from megatron_sppo.verification import verify as verification
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.worlds import pretrain
from tests.models import MIXTURES, tiny_llama
from tests.sharded_saves import save_by_megatron_core

FLAGS = "--params-dtype bfloat16 --lr 1e-2 --eta 10 --global-batch-size 8 --micro-batch-size 2 --train-iters 2"
LAYOUTS = {
    "TP2 x PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", {}),
    "VPP2": (2, "--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2", {}),
    "TP2, distributed optimizer, tied": (
        2,
        "--tensor-model-parallel-size 2 --use-distributed-optimizer",
        {"tie_word_embeddings": True},
    ),
    "EP2, distributed optimizer": (
        2,
        "--expert-model-parallel-size 2 --use-distributed-optimizer",
        MIXTURES["qwen3_moe"],
    ),
}
HEADS, GROUPS, HEAD = 8, 4, 8


def masters_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the float32 master weights with torch's own loader -> {Megatron key: tensor}."""
    described = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    names = {
        name: match[1]
        for name in described
        if (match := re.fullmatch(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?param\.(.*)", name))
    }
    state = {name: torch.empty(described[name].size, dtype=torch.float32) for name in names}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {names[name]: tensor for name, tensor in state.items()}


def hf_tensor(name: str, masters: dict[str, torch.Tensor], vocab: int) -> torch.Tensor:
    """Cut one Hugging Face tensor out of the masters, by hand -> float32."""
    top = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "lm_head.weight": "output_layer.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
    }
    if name in top:
        return masters[top[name]][:vocab]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
    assert match, name
    layer, rest = int(match[1]), match[2]

    def stacked(key: str) -> torch.Tensor:
        return masters[f"decoder.layers.{key}"][layer]

    if found := re.fullmatch(r"self_attn\.([qkv])_proj", rest):
        heads = HEADS // GROUPS
        fused = stacked("self_attention.linear_qkv.weight").reshape(GROUPS, heads + 2, HEAD, -1)
        rows = {"q": fused[:, :heads], "k": fused[:, heads], "v": fused[:, heads + 1]}[found[1]]
        return rows.reshape(-1, fused.shape[-1])
    if found := re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj", rest):
        expert = int(found[1])
        if found[2] == "down":
            return stacked("mlp.experts.experts.linear_fc2.weight")[expert]
        return stacked("mlp.experts.experts.linear_fc1.weight")[expert].chunk(2)[found[2] == "up"]
    if found := re.fullmatch(r"mlp\.(gate|up)_proj", rest):
        return stacked("mlp.linear_fc1.weight").chunk(2)[found[1] == "up"]
    norm = "pre_mlp_layernorm.weight"
    if f"decoder.layers.{norm}" not in masters:
        norm = "mlp.linear_fc1.layer_norm_weight"
    return stacked(
        {
            "self_attn.o_proj": "self_attention.linear_proj.weight",
            "mlp.down_proj": "mlp.linear_fc2.weight",
            "mlp.gate": "mlp.router.weight",
            "input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
            "post_attention_layernorm": norm,
            "self_attn.q_norm": "self_attention.q_layernorm.weight",
            "self_attn.k_norm": "self_attention.k_layernorm.weight",
        }[rest]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_checkpoint_exports_to_its_rounded_masters(tmp_path: Path, layout: str) -> None:
    ranks, flags, overrides = LAYOUTS[layout]
    hf = tiny_llama(tmp_path / "hf", num_hidden_layers=4, dtype="bfloat16", **overrides)
    import_checkpoint(hf, tmp_path / "megatron")
    data = write_dataset(tmp_path / "data", hf)
    places = ["--load", str(tmp_path / "megatron"), "--data", str(data), "--save", str(tmp_path / "trained")]
    assert run_ranks(pretrain, ranks, [*places, *FLAGS.split(), *flags.split()]) == [0] * ranks
    out = export_checkpoint(tmp_path / "trained", tmp_path / "out")
    masters = masters_of(tmp_path / "trained" / "iter_0000002")
    before, after = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in after.items():
        assert torch.equal(tensor, hf_tensor(name, masters, 259).bfloat16()), name
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert len(changed) > len(after) / 2, "two steps at a high rate move most weights"
    # In float32, of what was rounded: the same numbers.
    wide = load_file(export_checkpoint(tmp_path / "trained", tmp_path / "wide", dtype="float32") / "model.safetensors")
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in after.items())


def save_as_megatron_lm(source: str, target: str, tensor: int, pipeline: int) -> None:
    """Save a loaded model with everything that Megatron-LM's training loop saves beside it."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_sppo.model.config import ModelConfig
    from megatron_sppo.training import checkpoint, parallel
    from megatron_sppo.training.config import ParallelConfig
    from megatron_sppo.training.policy import build_policy

    architecture, _ = read_architecture(Path(source))
    layout = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    parallel.initialize(layout, seed=1)
    policy = build_policy(architecture, ModelConfig(params_dtype="bfloat16", transformer_impl="torch"), layout)
    checkpoint.load_weights(policy, Path(source))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = policy.stages[0].sharded_state_dict()
    state = {
        "args": argparse.Namespace(num_layers=architecture.num_layers, tensor_model_parallel_size=tensor, bf16=True),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "num_floating_point_operations_so_far": 12345,
        "model": model,
        "optimizer": {
            "optimizer": {"param_groups": [{"lr": 1e-5, "step": 7}]},
            "state": {name: _first_moment(value) for name, value in model.items() if _is_tensor(value)},
        },
        "opt_param_scheduler": {"max_lr": 1e-5, "num_steps": 7},
        "rng_state": ShardedObject("rng_state", [{"random_rng_state": (3, (1, 2), None)}], (ranks,), (rank,)),
        "rerun_state_machine": ShardedObject("rerun_state_machine", {"mode": "disabled"}, (ranks,), (rank,)),
    }
    if rank == 0:
        Path(target).mkdir(parents=True)
    torch.distributed.barrier()
    save_by_megatron_core(state, Path(target))
    parallel.shut_down()


def _is_tensor(value: Any) -> bool:
    return type(value).__name__ == "ShardedTensor"


def _first_moment(value: Any) -> Any:
    import dataclasses

    moment = torch.ones_like(value.data, dtype=torch.float32)
    return dataclasses.replace(value, key=f"optimizer.state.exp_avg.{value.key}", data=moment, dtype=torch.float32)


@pytest.mark.parametrize(("tensor", "pipeline", "name"), [(1, 1, "release"), (2, 2, "iter_0000007")])
def test_a_checkpoint_of_megatron_lm_exports_by_a_template(
    tmp_path: Path, tensor: int, pipeline: int, name: str
) -> None:
    hf = tiny_llama(tmp_path / "hf", num_hidden_layers=4, dtype="bfloat16")
    source = import_checkpoint(hf, tmp_path / "megatron")
    root = tmp_path / "megatron_lm"
    run_ranks(save_as_megatron_lm, tensor * pipeline, str(source), str(root / name), tensor, pipeline)
    (root / "latest_checkpointed_iteration.txt").write_text("release" if name == "release" else "7")
    (root / name / "run_config.yaml").write_text("model: {}\n")
    with pytest.raises(ConversionError, match="--template HF_DIR"):
        export_checkpoint(root, tmp_path / "out")
    out = export_checkpoint(root, tmp_path / "out", template=hf)
    original, result = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(original) == set(result)
    assert all(torch.equal(result[key], expected) for key, expected in original.items())
    for path in hf.iterdir():
        assert path.name == "model.safetensors" or (out / path.name).read_bytes() == path.read_bytes()
    for layerwise in (None, True):
        report = verification.verify(hf, root, dtype="float32", layerwise=layerwise)
        assert report["tensors"]["different"] == []
        assert report["logits"]["max_abs"] <= 1e-5 * max(1.0, report["logits"]["max_logit"])
