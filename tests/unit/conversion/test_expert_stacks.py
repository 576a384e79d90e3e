"""Files with all experts of a layer in one tensor are the same model as files with each expert apart.

The stacked form is transformers' own: what its model has in memory, in which Qwen3.5-MoE is published.
Not shown here: training, which sees the Megatron checkpoint alone, of which every byte is the same.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sppo.conversion.adapters import import_adapter
from megatron_sppo.conversion.complete import check_complete
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.conversion.merging import export_merged
from megatron_sppo.errors import ConversionError
from megatron_sppo.verification.compare import compare
from megatron_sppo.verification.verify import verify
from tests.adapters import random_adapter
from tests.families import family_model
from tests.unit.conversion.test_convert import shard
from tests.unit.conversion.test_wrapped import content, wrapped_model

STACK = "layers.1.mlp.experts.gate_up_proj"
FAMILIES = ("qwen3_moe, dense between", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "glm4_moe")


def stacked(source: Path, directory: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Copy a model, its weights named and laid out as transformers' model has them -> the copy."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_wrapped = "text_config" in json.loads((source / "config.json").read_text())
    kind = AutoModelForImageTextToText if is_wrapped else AutoModelForCausalLM
    model = kind.from_pretrained(source, dtype=dtype or torch.float32)
    shutil.copytree(source, directory)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        tensors.pop("lm_head.weight")
    assert any(name.endswith("mlp.experts.down_proj") for name in tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def edit(hf: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        hf / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Qwen3.5-MoE that sees images, in bfloat16 as published: (experts together, experts apart)."""
    place = tmp_path_factory.mktemp("qwen3_5_moe")
    published = stacked(wrapped_model(place / "float32", "qwen3_5_moe"), place / "together", dtype=torch.bfloat16)
    # The layer that predicts a further token is carried along, whatever its form.
    further = {"mtp.layers.0.mlp.experts.gate_up_proj": torch.arange(96.0).reshape(4, 6, 4).bfloat16()}
    edit(published, lambda tensors: tensors.update(further))
    apart = place / "apart"
    shutil.copytree(published, apart)
    edit(apart, take_apart)
    return published, apart


def take_apart(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers." in name and ".mlp.experts." in name and "mtp." not in name]:
        begin, _, kind = name.rpartition(".")
        for expert, both in enumerate(tensors.pop(name)):
            halves = (
                zip(("gate_proj", "up_proj"), both.chunk(2), strict=True) if kind != "down_proj" else ((kind, both),)
            )
            for part, rows in halves:
                tensors[f"{begin}.{expert}.{part}.weight"] = rows.clone()


def test_every_byte_comes_back_and_the_checkpoint_is_that_of_experts_apart(
    forms: tuple[Path, Path], tmp_path: Path
) -> None:
    together, apart = forms
    first = import_checkpoint(together, tmp_path / "megatron")
    assert content(export_checkpoint(tmp_path / "megatron", tmp_path / "out")) == content(together)
    other = import_checkpoint(apart, tmp_path / "other")
    assert content(export_checkpoint(tmp_path / "other", tmp_path / "out2")) == content(apart)
    weights = sorted(path.name for path in first.glob("*.distcp"))
    assert weights
    for name in [*weights, ".metadata", "model.json", "common.pt"]:
        assert (first / name).read_bytes() == (other / name).read_bytes(), name
    assert compare(together, apart, logits=False)["differences"] == []
    assert compare(apart, tmp_path / "megatron", logits=False)["differences"] == []
    import_checkpoint(together, tmp_path / "megatron")  # the same command again finds its work done
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_with_experts_of_their_own_is_read_so(name: str, tmp_path: Path) -> None:
    hf = family_model(tmp_path / "apart", name)
    together = stacked(hf, tmp_path / "together")
    shard(together, 2)
    assert check_complete(together)
    import_checkpoint(together, tmp_path / "megatron")
    assert content(export_checkpoint(tmp_path / "megatron", tmp_path / "out")) == content(together)
    assert compare(hf, tmp_path / "megatron", logits=False)["differences"] == []


def test_new_files_have_the_form_of_the_imported_ones(forms: tuple[Path, Path], tmp_path: Path) -> None:
    """In small shards and another type; each loads in transformers as it is."""
    together, apart = forms
    for form, name in ((together, "together"), (apart, "apart")):
        import_checkpoint(form, tmp_path / name)
        out = export_checkpoint(tmp_path / name, tmp_path / f"{name}-out", dtype="float32", max_shard_size="60KB")
        found: dict[str, Tensor] = {}
        for path in sorted(out.glob("model-*.safetensors")):
            found |= load_file(path)
        expected = load_file(form / "model.safetensors")
        assert set(found) == set(expected)
        for tensor in found:
            wanted = expected[tensor]
            is_carried = tensor.startswith(("mtp.", "model.visual."))
            assert torch.equal(found[tensor], wanted if is_carried else wanted.float()), tensor


def test_logits_are_hugging_faces_whole_and_by_layer(tmp_path: Path) -> None:
    hf = stacked(family_model(tmp_path / "hf", "qwen3_5_moe_text"), tmp_path / "together")
    import_checkpoint(hf, tmp_path / "megatron")
    for layerwise in (False, True):
        report = verify(hf, tmp_path / "megatron", layerwise=layerwise)
        assert report["faults"] == []
        assert report["logits"]["max_abs"] <= 1e-5


def test_adapters_merge_into_either_form(tmp_path: Path) -> None:
    hf = family_model(tmp_path / "apart", "qwen3_moe")
    together = stacked(hf, tmp_path / "together")
    adapter = random_adapter(tmp_path / "adapter", hf)
    merged = []
    for base in (hf, together):
        root = tmp_path / f"{base.name}-adapters"
        import_adapter(adapter, root, base=base)
        out = export_merged(root, tmp_path / f"{base.name}-merged", base=base)
        assert set(load_file(out / "model.safetensors")) == set(load_file(base / "model.safetensors"))
        export_merged(root, out, base=base)  # the same command again finds its work done
        merged.append(out)
    assert compare(*merged, logits=False)["differences"] == []
    different = compare(together, merged[1], logits=False)["differences"]
    assert any(".mlp.experts.3.up_proj.weight" in line for line in different)


def _first(tensors: dict[str, Tensor], end: str) -> str:
    return next(name for name in tensors if name.endswith(end) and "mtp." not in name)


def replace(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({_first(tensors, end): change(tensors[_first(tensors, end)])})


MALFORMED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "an expert is missing": (
        replace(STACK, lambda tensor: tensor[:3]),
        r"holds model\.layers\.1\.mlp\.experts\.gate_up_proj of shape \[3, 48, 48\] where .* promises \[4, 48, 48\]",
    ),
    "an expert too many": (
        replace(STACK, lambda tensor: tensor[[0, 1, 2, 3, 3]]),
        r"gate_up_proj of shape \[5, 48, 48\] where .* promises \[4, 48, 48\]",
    ),
    "columns before rows": (
        replace("layers.1.mlp.experts.down_proj", lambda tensor: tensor.transpose(1, 2)),
        r"down_proj of shape \[4, 24, 48\] where .* promises \[4, 48, 24\]",
    ),
    "gate alone": (
        replace(STACK, lambda tensor: tensor[:, :24]),
        r"gate_up_proj of shape \[4, 24, 48\] where .* promises \[4, 48, 48\]",
    ),
    "all in one matrix": (
        replace(STACK, lambda tensor: tensor.reshape(-1, 48)),
        r"gate_up_proj of shape \[192, 48\] where .* promises \[4, 48, 48\]",
    ),
    "a stack is missing": (
        lambda tensors: tensors.pop(_first(tensors, STACK)),
        r"lacks model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight",
    ),
    "an expert in both forms": (
        lambda tensors: tensors.update(
            {_first(tensors, STACK).replace("gate_up_proj", "2.up_proj.weight"): torch.zeros(24, 48).bfloat16()}
        ),
        r"experts\.gate_up_proj, in which model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight is",
    ),
    "a stack behind the last layer": (
        lambda tensors: tensors.update(
            {_first(tensors, STACK).replace(".1.", ".3."): torch.zeros(4, 48, 48).bfloat16()}
        ),
        r"holds model\.layers\.3\.mlp\.experts\.gate_up_proj, for which there is no rule",
    ),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_stack_is_one_line_and_nothing_is_written(
    case: str, forms: tuple[Path, Path], tmp_path: Path
) -> None:
    change, named = MALFORMED[case]
    hf = tmp_path / "hf"
    shutil.copytree(forms[0], hf)
    edit(hf, change)
    with pytest.raises(ConversionError, match=named) as caught:
        import_checkpoint(hf, tmp_path / "megatron")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
