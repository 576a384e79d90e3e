"""Proves: malformed mixtures are refused in a line, and what is no part of the decoder comes back as it was.

Files of tests.models, which have the names of the hub's; logits and gradients are in tests/distributed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sppo.checkpoints.megatron_checkpoint import CARRIED_FILE, carry_model_files
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.verification.compare import compare
from tests.models import MIXTURES, llama_config, tiny_llama

GLM, QWEN2 = MIXTURES["glm4_moe"], MIXTURES["qwen2_moe"]
MLP = "model.layers.1.mlp"
FURTHER = {
    "model.layers.2.eh_proj.weight": torch.arange(8192.0).reshape(64, 128),
    "model.layers.2.enorm.weight": torch.tensor([float("nan"), -0.0] * 32),
    "model.layers.2.mlp.gate.e_score_correction_bias": torch.arange(4.0),
}


def edit(hf: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})


# (config, what is done to its tensors, words of the refusal)
MALFORMED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "an expert is missing": (
        QWEN2,
        lambda t: [t.pop(name) for name in [*t] if ".experts.3." in name and ".1.mlp" in name],
        r"lacks model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight.*which its config\.json promises",
    ),
    "an expert too many": (
        QWEN2,
        lambda t: t.update({f"{MLP}.experts.4.up_proj.weight": torch.zeros(32, 64)}),
        r"holds model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight, for which there is no rule",
    ),
    "a shared expert of another width": (
        QWEN2,
        lambda t: t.update({f"{MLP}.shared_expert.up_proj.weight": torch.zeros(40, 64)}),
        r"shared_expert\.up_proj\.weight of shape \[40, 64\] where its config\.json promises \[48, 64\]",
    ),
    "no gate of the shared expert": (
        QWEN2,
        lambda t: t.pop(f"{MLP}.shared_expert_gate.weight"),
        r"lacks model\.layers\.1\.mlp\.shared_expert_gate\.weight",
    ),
    "a dense layer where the config says experts": (
        {**QWEN2, "mlp_only_layers": [1]},
        lambda t: None,
        r"lacks model\.layers\.1\.mlp\.gate_proj\.weight.* and holds",
    ),
    "a bias of another length": (
        GLM,
        lambda t: t.update({f"{MLP}.gate.e_score_correction_bias": torch.zeros(5)}),
        r"e_score_correction_bias of shape \[5\] where its config\.json promises \[4\]",
    ),
    "no bias": (
        GLM,
        lambda t: t.pop(f"{MLP}.gate.e_score_correction_bias"),
        r"lacks model\.layers\.1\.mlp\.gate\.e_score_correction_bias",
    ),
    "two further layers of one that is promised": (
        GLM,
        lambda t: t.update({"model.layers.3.enorm.weight": torch.zeros(64)}),
        r"holds model\.layers\.3\.enorm\.weight, for which there is no rule",
    ),
    "a further layer where none is promised": (
        {**GLM, "num_nextn_predict_layers": 0},
        lambda t: t.update(FURTHER),
        r"holds model\.layers\.2\.eh_proj\.weight.* for which there is no rule",
    ),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_mixture_is_one_line_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    config, change, named = MALFORMED[case]
    hf = tiny_llama(tmp_path / "hf", **{key: value for key, value in config.items() if key != "mlp_only_layers"})
    edit(hf, change)
    (hf / "config.json").write_text(json.dumps(json.loads((hf / "config.json").read_text()) | config))
    with pytest.raises((ConversionError, DataError), match=named) as caught:
        import_checkpoint(hf, tmp_path / "megatron")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob: false and num_experts_per_tok: 2"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob: true and num_experts_per_tok: 1"),
        ({"n_group": 3, "topk_group": 1}, r"moe_router_num_groups \(3\) must divide num_moe_experts \(4\)"),
        ({"n_group": 2, "topk_group": 3}, r"moe_router_group_topk \(3\) be less"),
        ({"n_routed_experts": 8, "n_group": 4, "topk_group": 2}, "2 experts are chosen from 2 of 4 groups"),
        ({"first_k_dense_replace": 2}, "none of the 2 layers has experts"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace is missing"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ({"use_qk_norm": "yes"}, "use_qk_norm is 'yes'"),
        ({"n_routed_experts": 5, "num_local_experts": 4}, "n_routed_experts: 5 and num_local_experts: 4"),
    ],
)
def test_a_router_that_megatron_core_does_not_compute_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        architecture_from_hf({**llama_config(), **GLM, **changes})


def test_all_groups_are_none_and_one_more_would_be_some() -> None:
    settings = {**llama_config(), **GLM, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4}
    assert architecture_from_hf({**settings, "topk_group": 4}).moe_router_num_groups is None
    some = architecture_from_hf({**settings, "topk_group": 2})
    assert (some.moe_router_num_groups, some.moe_router_group_topk) == (4, 2)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_layers_behind_the_decoder_come_back_byte_for_byte(dtype: str | None, tmp_path: Path) -> None:
    """Also where the rest is cast; and the routers' float32 biases stay what they are in a bfloat16 model."""
    hf = tiny_llama(tmp_path / "hf", dtype="bfloat16", **GLM)
    edit(hf, lambda tensors: tensors.update(FURTHER))
    import_checkpoint(hf, tmp_path / "megatron", dtype=dtype)
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out", dtype=None if dtype is None else "bfloat16")
    if dtype is None:
        assert (out / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    original, result = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(original) == set(result)
    for name, tensor in original.items():
        assert result[name].dtype == tensor.dtype
        assert torch.equal(result[name].view(torch.int8), tensor.view(torch.int8)), name
    assert compare(hf, tmp_path / "megatron", logits=False)["differences"] == [] or dtype is not None
    import_checkpoint(hf, tmp_path / "megatron", dtype=dtype)  # the same command again finds its work done
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", dtype=None if dtype is None else "bfloat16")


def test_a_later_checkpoint_has_the_carried_tensors_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf", **GLM)
    edit(hf, lambda tensors: tensors.update(FURTHER))
    first = import_checkpoint(hf, tmp_path / "megatron")
    later = tmp_path / "later"
    later.mkdir()
    carry_model_files(first, later)
    carried = first / "hf" / CARRIED_FILE
    assert (later / "hf" / CARRIED_FILE).read_bytes() == carried.read_bytes()
    assert set(load_file(carried)) == set(FURTHER)
    content = bytearray(carried.read_bytes())
    content[-3] ^= 1
    carried.write_bytes(content)
    with pytest.raises(DataError, match=f"{CARRIED_FILE} is not what was written"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()
