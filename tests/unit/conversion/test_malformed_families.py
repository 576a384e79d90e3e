"""Each family's model with one tensor of each kind missing, of another shape, or beside one too many: refused by name.

The models are transformers' own (tests.families), gpt-oss's also as published, in MXFP4. What is wrong with a config is
in test_hf_config.py, with whole mixtures in test_mixtures.py, with blocks and scales in test_mxfp4.py and test_fp8.py.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.errors import ConversionError
from tests.families import FAMILIES, family_model


def kinds_of(tensors: dict[str, Tensor]) -> list[str]:
    """Take one tensor of each kind, the last: names that differ in layer and expert alone are of one."""
    return list({re.sub(r"\.\d+\.", ".N.", name): name for name in tensors}.values())


def changes_of(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Spoil a model in each way -> (the tensor that an error must name, its tensors)."""
    for name in kinds_of(tensors):
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        yield name, others
        yield name, {**others, name: torch.cat((tensors[name], tensors[name][:1]))}
        yield name, {**others, name: tensors[name][None]}
    deepest = max(int(found[1]) for name in tensors if (found := re.search(r"layers\.(\d+)\.", name)))
    beyond = f"model.layers.{deepest + 1}.self_attn.q_proj.weight"
    yield beyond, {**tensors, beyond: torch.zeros(4, 4)}
    yield "model.adapter.weight", {**tensors, "model.adapter.weight": torch.zeros(4)}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_malformed_model_is_one_line_and_nothing_is_written(family: str, tmp_path: Path) -> None:
    hf = family_model(tmp_path / "hf", family)
    tensors = load_file(hf / "model.safetensors")
    bad = tmp_path / "bad"
    shutil.copytree(hf, bad)
    count = 0
    for name, changed in changes_of(tensors):
        if name == "lm_head.weight" and name not in changed:
            continue  # said by test_convert.py
        save_file(changed, bad / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=re.escape(name)) as caught:
            import_checkpoint(bad, tmp_path / "megatron")
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "hf"]
        count += 1
    assert count > 25
