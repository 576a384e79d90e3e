"""Proves: a model with a weight that its files do not hold, or hold in another shape, is refused by that weight's name,
and nothing in the package loads a model by another way. Which models there are is transformers' business.
"""

import ast
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.errors import ConversionError

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 1,
}
UP = "model.layers.1.mlp.up_proj.weight"


def changed(model: torch.nn.Module, directory: Path, change) -> Path:
    """Save a model, then let `change` have its tensors -> the directory."""
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def other_head(tensors: dict) -> None:
    tensors["value_head.weight"] = tensors.pop("score.weight")


def language_model(tensors: dict) -> None:
    del tensors["score.weight"]
    tensors["lm_head.weight"] = torch.zeros(64, 32)


def without_a_layer(tensors: dict) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        del tensors[name]


def transposed(tensors: dict) -> None:
    tensors[UP] = tensors[UP].T.contiguous()


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (other_head, ["lacks score.weight", "holds value_head.weight instead"]),
        (language_model, ["lacks score.weight", "holds lm_head.weight instead"]),
        (without_a_layer, ["lacks model.layers.1.", "and 4 more"]),
        (transposed, [f"another shape {UP} (32x48 in the file, 48x32 by config.json)"]),
    ],
)
def test_a_weight_that_would_be_made_up_is_refused_by_name(tmp_path: Path, change, facts: list[str]) -> None:
    directory = changed(LlamaForSequenceClassification(LlamaConfig(**SMALL)), tmp_path / "m", change)
    with pytest.raises(ConversionError) as caught:
        load_pretrained(AutoModelForSequenceClassification, directory)
    for fact in facts:
        assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_not_missed_and_untied_ones_are(tmp_path: Path, tied: bool) -> None:
    """lm_head.weight is in no file of a tied model; taken out of an untied one's, it is missing."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    directory = changed(model, tmp_path / "m", lambda tensors: tensors.pop("lm_head.weight", None))
    if tied:
        loaded = load_pretrained(AutoModelForCausalLM, directory)
        assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
    else:
        with pytest.raises(ConversionError, match="lacks lm_head.weight"):
            load_pretrained(AutoModelForCausalLM, directory)


def test_tensors_without_a_place_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    directory = changed(model, tmp_path / "m", lambda tensors: tensors.update(critic=torch.zeros(2)))
    with caplog.at_level(logging.WARNING):
        loaded = load_pretrained(AutoModelForCausalLM, directory)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert [record.getMessage() for record in caplog.records] == [
        f"{directory} holds critic, which a LlamaForCausalLM does not use."
    ]


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ConversionError, match="damaged safetensors file"):
        load_pretrained(AutoModelForCausalLM, tmp_path)


def test_only_the_needed_weights_must_be_there(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.layers.0.")}
    settings = {"config": model.config, "state_dict": state}
    load_pretrained(LlamaForCausalLM, None, needed="model.layers.0.", **settings)
    del state["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(ConversionError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_pretrained(LlamaForCausalLM, None, needed="model.layers.0.", **settings)


def test_no_model_is_loaded_by_another_way() -> None:
    """Every `X.from_pretrained(...)` of the package and the tools is a tokenizer's or a config's, but the one place."""
    found = []
    for folder in ("megatron_sppo", "tools", "examples"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
                    owner = ast.unparse(node.value)
                    if not owner.endswith(("Tokenizer", "Config")):
                        found.append(f"{path.relative_to(REPOSITORY)}: {owner}")
    assert found == ["megatron_sppo/checkpoints/pretrained.py: model_class"]
