"""A model whose files lack what its config promises is refused before anybody loads it; what it has besides is left."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_sppo.conversion.complete import check_complete
from megatron_sppo.errors import ConversionError
from tests.models import tiny_llama

Q = "model.layers.1.self_attn.q_proj.weight"


def changed(directory: Path, change, **settings: object) -> Path:
    tiny_llama(directory)
    path = next(directory.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **settings}))
    return directory


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda tensors: tensors.pop(Q), f"lacks {Q}"),
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda tensors: tensors.update({Q: tensors[Q][:-1].contiguous()}), f"holds {Q} of shape"),
    ],
)
def test_a_missing_or_mis_shaped_weight_is_refused_by_name(tmp_path: Path, change, fact: str) -> None:
    with pytest.raises(ConversionError, match=fact):
        check_complete(changed(tmp_path / "m", change))


def test_a_whole_model_and_one_with_more_than_its_family_has_pass(tmp_path: Path) -> None:
    assert check_complete(changed(tmp_path / "whole", lambda tensors: None))
    more = changed(tmp_path / "more", lambda tensors: tensors.update(critic=tensors["model.norm.weight"].clone()))
    assert check_complete(more)


@pytest.mark.parametrize("settings", [{"model_type": "mamba"}, {"quantization_config": {"quant_method": "awq"}}])
def test_what_no_table_describes_is_left_to_who_loads_it(tmp_path: Path, settings: dict[str, object]) -> None:
    assert not check_complete(changed(tmp_path / "m", lambda tensors: tensors.pop(Q), **settings))
