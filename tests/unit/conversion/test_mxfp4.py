"""gpt-oss's MXFP4 experts go to Megatron and back as the very numbers that transformers makes of them.

Truth is transformers: its function on random bytes, and its model that loads the quantized directory by itself.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_sppo.checkpoints.mxfp4 import dequantize
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.errors import ConversionError
from tests.families import family_model, token_ids
from tests.quantized import assert_found_again

WIDTHS = {"hidden_size": 64, "intermediate_size": 96}
QUANTIZED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
}


def random_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss directory in bfloat16 whose experts are blocks and scales, as OpenAI's files have them."""
    hf = family_model(tmp_path_factory.mktemp("quantized") / "hf", "gpt_oss", **WIDTHS)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(hf / "model.safetensors").items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = random_bytes(experts, rows, columns // 32, 16)
        tensors[f"{name}_scales"] = random_bytes(experts, rows, columns // 32, low=120, high=125)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": QUANTIZED}))
    return hf


def test_numbers_are_those_of_transformers_for_every_byte_and_exponent() -> None:
    blocks = random_bytes(2, 256, 4, 16)
    scales = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).repeat(2, 1, 4)
    ours, theirs = dequantize(blocks, scales), convert_moe_packed_tensors(blocks.clone(), scales.clone())
    assert set(blocks.flatten().tolist()) == set(range(256))
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))  # signs of zeros and NaNs too


def test_an_export_is_what_transformers_makes_of_the_quantized_files(quantized: Path, tmp_path: Path) -> None:
    megatron = import_checkpoint(quantized, tmp_path / "megatron")
    hf = export_checkpoint(megatron, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16)
    ours = load_file(hf / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in ours.items()} == dict.fromkeys(theirs.state_dict(), torch.bfloat16)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor.bfloat16()), name
    assert "quantization_config" not in json.loads((hf / "config.json").read_text())
    tokens = token_ids(1, 24)
    loaded = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)


def test_the_same_import_again_and_a_comparison_find_the_same_model(quantized: Path, tmp_path: Path) -> None:
    assert_found_again(quantized, tmp_path)


BLOCKS, SCALES = (f"model.layers.1.mlp.experts.down_proj_{part}" for part in ("blocks", "scales"))
MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no scales": (lambda t: t.pop(SCALES), r"down_proj_blocks without .*down_proj_scales"),
    "no blocks": (lambda t: t.pop(BLOCKS), r"down_proj_scales without .*down_proj_blocks"),
    "neither": (lambda t: (t.pop(BLOCKS), t.pop(SCALES)), r"lacks model\.layers\.1\.mlp\.experts\.down_proj"),
    "scales of other groups": (
        lambda t: t.update({SCALES: t[SCALES].repeat(1, 1, 2)}),
        r"scales of shape \[4, 64, 6\], which must be \[4, 64, 3\]",
    ),
    "blocks of 32 bytes": (
        lambda t: t.update({BLOCKS: t[BLOCKS].repeat(1, 1, 1, 2)}),
        r"\[experts, rows, blocks, 16\]",
    ),
    "an expert too few": (
        lambda t: t.update({name: t[name][:3].contiguous() for name in (BLOCKS, SCALES)}),
        r"down_proj of shape \[3, 96, 64\] where .* promises \[4, 96, 64\]",
    ),
    "scales in bfloat16": (lambda t: t.update({SCALES: t[SCALES].bfloat16()}), r"without .*scales|scaled by BF16"),
    "attention packed too": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": random_bytes(80, 64)}),
        r"q_proj\.weight is of type U8",
    ),
    "sinks of other heads": (
        lambda t: t.update({"model.layers.0.self_attn.sinks": torch.zeros(5, dtype=torch.bfloat16)}),
        r"sinks of shape \[5\] where .* promises \[4\]",
    ),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(("damage", "named"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_quantized_files_are_one_line_and_nothing_is_written(
    damage: Callable[[dict[str, Any]], Any], named: str, quantized: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    for path in quantized.iterdir():
        (hf / path.name).write_bytes(path.read_bytes())
    tensors = load_file(hf / "model.safetensors")
    damage(tensors)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=named) as caught:
        import_checkpoint(hf, tmp_path / "megatron")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "megatron").glob("iter_*"))
