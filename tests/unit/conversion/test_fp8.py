"""DeepSeek's FP8 weights go to Megatron and back as the very numbers that transformers makes of them.

Truth is transformers, its function and its model that loads the quantized directory by itself, where blocks divide the
weight; where they do not, transformers has no answer, and truth is the definition: each number times its block's scale.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from megatron_sppo.checkpoints.fp8 import dequantize
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.errors import ConversionError
from tests.families import family_model
from tests.quantized import assert_found_again

BLOCK = (4, 2)  # divides every weight below
LINEARS = ("_proj.weight", "_proj_with_mqa.weight")
FURTHER = "model.layers.3.eh_proj.weight"
"""A weight of the layer that predicts a further token, as published; transformers overlooks it."""


def quantize(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each block to E4M3's largest number, 448 -> (float8, scales), of whole blocks and parts of them."""
    rows, columns = (-(-side // width) for side, width in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            place = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scales[row, column] = weight[place].abs().max() / 448
            numbers[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
    return numbers, scales


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 directory in bfloat16 whose linear layers are FP8, as DeepSeek's files have them."""
    hf = family_model(tmp_path_factory.mktemp("quantized") / "hf", "deepseek_v3")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(hf / "model.safetensors").items()}
    tensors[FURTHER] = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    tensors["model.layers.3.enorm.weight"] = torch.ones(48, dtype=torch.bfloat16)
    for name in [name for name in tensors if name.endswith(LINEARS)]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensors[name].float(), BLOCK)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    described = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
    config = json.loads((hf / "config.json").read_text())
    config |= {"dtype": "bfloat16", "num_nextn_predict_layers": 1, "quantization_config": described}
    (hf / "config.json").write_text(json.dumps(config))
    return hf


def test_numbers_are_those_of_transformers_for_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    scales = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(every, scales, output_dtype=torch.bfloat16)
    ours = dequantize(every, scales, block=BLOCK)
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))  # signs of zeros and NaNs too


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_blocks_at_the_edge_are_cut_and_rows_may_be_read_alone(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 9, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 3, generator=generator).to(kind)
    expected = torch.tensor(
        [[weight[i, j].float() * scales[i // 4, j // 4].float() for j in range(9)] for i in range(13)]
    ).bfloat16()
    assert torch.equal(dequantize(weight, scales, block=(4, 4)), expected)
    assert torch.equal(dequantize(weight[5:11], scales, block=(4, 4), first_row=5), expected[5:11])


def test_an_export_is_what_transformers_makes_of_the_quantized_files(quantized: Path, tmp_path: Path) -> None:
    megatron = import_checkpoint(quantized, tmp_path / "megatron")
    hf = export_checkpoint(megatron, tmp_path / "hf")
    assert "quantization_config" not in json.loads((hf / "config.json").read_text())
    source, ours = load_file(quantized / "model.safetensors"), load_file(hf / "model.safetensors")
    assert set(ours) == {name for name in source if not name.endswith("_scale_inv")}
    further = dequantize(source[FURTHER], source[f"{FURTHER}_scale_inv"], block=BLOCK)
    assert torch.equal(ours[FURTHER], further)
    plain = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(plain[name], tensor), name


def test_the_same_import_again_and_a_comparison_find_the_same_model(quantized: Path, tmp_path: Path) -> None:
    assert_found_again(quantized, tmp_path)


UP = "model.layers.1.self_attn.kv_b_proj.weight"
SCALES = f"{UP}_scale_inv"
EXPERT = "model.layers.2.mlp.experts.7.down_proj.weight"
MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no scales": (lambda t: t.pop(SCALES), r"kv_b_proj\.weight in F8_E4M3 without .*kv_b_proj\.weight_scale_inv"),
    "no weight": (lambda t: t.pop(UP), r"kv_b_proj\.weight_scale_inv without its weight"),
    "neither": (lambda t: (t.pop(UP), t.pop(SCALES)), r"lacks model\.layers\.1\.self_attn\.kv_b_proj\.weight"),
    "scales of other blocks": (
        lambda t: t.update({SCALES: t[SCALES][:, :5].contiguous()}),
        r"scales of shape \[22, 5\] and type F32; blocks of 4 x 2 need \[22, 7\]",
    ),
    "scales of integers": (lambda t: t.update({SCALES: t[SCALES].to(torch.uint8)}), r"type U8; blocks of 4 x 2"),
    "scales beside a plain weight": (lambda t: t.update({UP: t[UP].bfloat16()}), r"its weight in BF16, not F8_E4M3"),
    "weight of integers": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}), r"of type I8"),
    "an expert too few": (
        lambda t: (t.pop(EXPERT), t.pop(f"{EXPERT}_scale_inv")),
        r"lacks model\.layers\.2\.mlp\.experts\.7\.down_proj\.weight",
    ),
    "a row too few": (
        lambda t: t.update({UP: t[UP][:-4].contiguous(), SCALES: t[SCALES][:-1].contiguous()}),
        r"kv_b_proj\.weight of shape \[84, 14\] where .* promises \[88, 14\]",
    ),
    "a bias too short": (
        lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(7)}),
        r"e_score_correction_bias of shape \[7\] where .* promises \[8\]",
    ),
}


def damaged(quantized: Path, hf: Path) -> Path:
    hf.mkdir()
    for path in quantized.iterdir():
        (hf / path.name).write_bytes(path.read_bytes())
    return hf


def refused(hf: Path, megatron: Path, named: str) -> None:
    with pytest.raises(ConversionError, match=named) as caught:
        import_checkpoint(hf, megatron)
    assert "\n" not in str(caught.value)
    assert not list(megatron.glob("iter_*"))


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(("damage", "named"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_quantized_files_are_one_line_and_nothing_is_written(
    damage: Callable[[dict[str, Any]], Any], named: str, quantized: Path, tmp_path: Path
) -> None:
    hf = damaged(quantized, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    damage(tensors)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    refused(hf, tmp_path / "megatron", named)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    "described",
    [
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]},
        {"weight_block_size": 128},
        {"fmt": "e5m2"},
    ],
    ids=str,
)
def test_blocks_of_no_size_and_other_formats_are_one_line(
    described: dict[str, Any], quantized: Path, tmp_path: Path
) -> None:
    hf = damaged(quantized, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(
        json.dumps(config | {"quantization_config": config["quantization_config"] | described})
    )
    refused(hf, tmp_path / "megatron", "weight_block_size")
