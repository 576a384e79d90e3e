"""Proves: `convert compare` names every difference between two models of any kind, exit 1; 0 where there is none.

Not proven here: logits of models that are run layer by layer (test_layerwise.py, test_verify.py).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.checkpoints.distcp_writer import Piece, write_distcp
from megatron_sppo.checkpoints.megatron_checkpoint import MANIFEST_FILE, write_manifest
from megatron_sppo.commands import convert as command
from megatron_sppo.conversion import convert
from megatron_sppo.conversion.binding import megatron_shapes
from megatron_sppo.conversion.megatron_model import open_megatron
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.verification.compare import compare, summary
from tests.models import CHAT_TEMPLATE, MIXTURES, tiny_llama

DOWN = "model.layers.0.mlp.down_proj.weight"


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edited(hf: Path) -> None:
        tensors = load_file(hf / "model.safetensors")
        change(tensors)
        save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})

    return edited


def rewrite(name: str, **values: Any) -> Callable[[Path], None]:
    def rewritten(hf: Path) -> None:
        content = json.loads((hf / name).read_text()) if (hf / name).is_file() else {}
        (hf / name).write_text(json.dumps(content | values))

    return rewritten


def first_value(change: float) -> Callable[[Path], None]:
    """Move one value of one tensor by an amount that float32 holds exactly beside 0."""

    def moved(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN][0, 0] = change

    return edit(moved)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "one")


@pytest.mark.parametrize("other_kind", ["hf", "root", "iteration"])
@pytest.mark.parametrize("one_kind", ["hf", "root"])
def test_one_model_in_two_places_differs_in_nothing(one_kind: str, other_kind: str, hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "copy")
    iteration = convert.import_checkpoint(hf, tmp_path / "root")
    places = {"hf": tmp_path / "copy", "root": tmp_path / "root", "iteration": iteration}
    report = compare({"hf": hf, "root": tmp_path / "root"}[one_kind], places[other_kind])
    assert report["differences"] == []
    assert report["tensors"]["equal"] == report["tensors"]["compared"] == len(load_file(hf / "model.safetensors"))
    assert report["logits"]["max_abs"] <= 1e-5


@pytest.mark.parametrize("kind", ["hf", "megatron"])
@pytest.mark.parametrize(
    ("damage", "sentences"),
    [
        (edit(lambda t: t.pop(DOWN)), [rf"lacks {DOWN} (float32 [64, 96])"]),
        (edit(lambda t: t.update({DOWN: t[DOWN].T.contiguous()})), [f"{DOWN} has shape [64, 96] and [96, 64]"]),
        (edit(lambda t: t.update(stray=torch.ones(2))), ["lacks stray (float32 [2])"]),
        (
            edit(lambda t: t.update({DOWN: t[DOWN].bfloat16()})),
            [f"{DOWN} is float32 and bfloat16; equal after a cast"],
        ),
        (first_value(float("nan")), [f"{DOWN}: 1 of {64 * 96} values differ, by up to not a number"]),
        (first_value(4.0), [f"{DOWN}: 1 of {64 * 96} values differ, by up to 4", "logits differ by up to"]),
        (rewrite("config.json", rms_norm_eps=0.5), ["layernorm_epsilon is 1e-05 in", "logits differ by up to"]),
        (rewrite("config.json", eos_token_id=1), ["config.json says eos_token_id: 2 and 1"]),
        (rewrite("generation_config.json", temperature=0.6), ["generation_config.json says temperature: null and 0.6"]),
        (lambda hf: (hf / "chat_template.jinja").write_text("{{ messages }}"), ["the tokenizers treat"]),
        (
            # In a case that no probe tries.
            lambda hf: (hf / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{% if documents %}.{% endif %}"),
            ["the chat templates differ"],
        ),
        (rewrite("config.json", architectures=["Own"]), ['architectures: ["LlamaForCausalLM"] and ["Own"]']),
    ],
    ids=[
        "missing",
        "shape",
        "extra",
        "dtype",
        "nan",
        "value",
        "epsilon",
        "eos",
        "generation",
        "template",
        "template, unprobed",
        "class",
    ],
)
def test_every_difference_is_named(
    kind: str, damage: Callable[[Path], Any], sentences: list[str], hf: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    damage(other)
    if kind == "megatron":
        convert.import_checkpoint(hf, tmp_path / "megatron")
    runs = any("logits" in sentence for sentence in sentences)
    differences = compare(hf if kind == "hf" else tmp_path / "megatron", other, logits=runs)["differences"]
    assert differences
    for sentence in sentences:
        assert any(sentence in difference for difference in differences), differences


def test_by_how_much_is_the_difference_of_the_values(hf: Path, tmp_path: Path) -> None:
    """All values of a tensor moved by 1/4, and one more by 8: the largest difference is 8.25."""
    shutil.copytree(hf, tmp_path / "other")

    def move(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN] = torch.zeros_like(tensors[DOWN])

    edit(move)(hf)
    edit(lambda t: t.update({DOWN: torch.full_like(t[DOWN], 0.25)}))(tmp_path / "other")
    edit(lambda t: t[DOWN][3, 5].add_(8))(tmp_path / "other")
    (entry,) = compare(hf, tmp_path / "other", logits=False)["tensors"]["different"]
    assert entry == {"name": DOWN, "kind": "values", "changed": 64 * 96, "of": 64 * 96, "max_abs": 8.25, "max_value": 0}


def test_a_family_without_a_table_is_compared_all_the_same(hf: Path, tmp_path: Path) -> None:
    for directory in (hf, tmp_path / "other"):
        if directory != hf:
            shutil.copytree(hf, directory)
        rewrite("config.json", model_type="gpt_neox")(directory)
    rewrite("config.json", rotary_pct=0.5)(tmp_path / "other")
    edit(lambda t: t.pop(DOWN))(tmp_path / "other")
    assert compare(hf, tmp_path / "other")["differences"] == [
        "config.json says rotary_pct: null and 0.5",
        f"{tmp_path / 'other'} lacks {DOWN} (float32 [64, 96])",
    ]


def test_a_tied_copy_of_the_embedding_is_no_difference(tmp_path: Path) -> None:
    one = tiny_llama(tmp_path / "one", tie_word_embeddings=True)
    shutil.copytree(one, tmp_path / "other")
    edit(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path / "other")
    report = compare(one, tmp_path / "other")
    assert report["differences"] == []
    assert list(report["tensors"]["left_out"]) == ["lm_head.weight"]


def without(opened: Any, lost: str, directory: Path) -> None:
    """Write a checkpoint again without the keys that have `lost` in their name, as a converter's fault would."""
    pieces = [
        Piece(
            key=key,
            offsets=(0,) * len(shape),
            sizes=shape,
            global_shape=shape,
            dtype=opened.reader.dtype(key),
            values=lambda key=key, shape=shape: opened.reader.read(key, (0,) * len(shape), shape),
        )
        for key, shape in megatron_shapes(opened.bindings, opened.architecture).items()
        if lost not in key
    ]
    again = directory.with_name("again")
    shutil.copytree(directory, again, ignore=shutil.ignore_patterns("*.distcp", "*.digests", MANIFEST_FILE))
    write_distcp(again, pieces, objects={}, progress=lambda nbytes: None)
    write_manifest(again)
    shutil.rmtree(directory)
    again.rename(directory)


def test_experts_that_a_converter_lost_are_named_one_by_one(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf", **MIXTURES["qwen3_moe"])
    iteration = convert.import_checkpoint(hf, tmp_path / "megatron")
    without(open_megatron(iteration), ".experts.", iteration)
    report = compare(hf, tmp_path / "megatron")
    lost = [entry["name"] for entry in report["tensors"]["different"]]
    assert sorted(lost) == sorted(
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for layer in range(2)
        for expert in range(4)
        for name in ("gate", "up", "down")
    )
    assert report["logits"] is None
    assert sum("lacks decoder.layers.mlp.experts" in line for line in report["differences"]) == 2


def test_the_exit_code_tells(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 equal, 1 different with a line for each difference, ConversionError (exit 2) unreadable."""
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    command.main("convert", ["compare", str(hf), str(other), "--no-logits"])
    first_value(4.0)(other)
    with pytest.raises(SystemExit) as different:
        command.main("convert", ["compare", str(hf), str(other), "--json", str(tmp_path / "report.json")])
    assert different.value.code == 1
    written = json.loads((tmp_path / "report.json").read_text())
    assert capsys.readouterr().out.count(f"{DOWN}: 1 of") == 1
    assert written["tensors"]["different"][0]["name"] == DOWN
    (other / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ConversionError, match="damaged header|cut short"):
        command.main("convert", ["compare", str(hf), str(other)])


def without_tokenizer(*names: str) -> Callable[[Path], None]:
    """Leave a directory its weights, with the named other files as no program can read them."""

    def damaged(hf: Path) -> None:
        for file in hf.iterdir():
            if "token" in file.name:
                file.unlink()
        for name in names:
            (hf / name).write_text('{"model_type": "nonsense"}')

    return damaged


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda hf: (hf / "tokenizer.json").write_text("{"), "holds no readable tokenizer"),
        (lambda hf: (hf / "tokenizer.json").write_text('{"model": 3}'), "holds no readable tokenizer"),
        (without_tokenizer("config.json"), r"transformers cannot load .* `convert compare --no-logits`"),
        (lambda hf: (hf / "config.json").write_text("{}"), "holds no readable tokenizer|transformers cannot load"),
    ],
    ids=["no JSON", "no tokenizer", "unknown model", "empty config"],
)
def test_what_transformers_cannot_read_is_unreadable_and_no_difference(
    hf: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    """Exit 2, which DataError and ConversionError become, and not 1: a script would take that for a difference."""
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    damage(other)
    with pytest.raises((ConversionError, DataError), match=message):
        compare(hf, other)


def test_a_side_without_a_tokenizer_is_said_to_have_none(hf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    without_tokenizer()(other)
    report = compare(other, hf, logits=False)
    assert f"{other} carries no tokenizer, {hf} has one" in report["differences"]
    assert not [sentence for sentence in report["differences"] if "other ids" in sentence]
    assert "tokenizers: not compared, for one side carries none" in list(summary(report))
