"""Proves: tools/convert.py as a user runs it: exit codes, one line of error, `verify` against transformers.

The logits' truth is transformers' LlamaForCausalLM; the Megatron model is the one that training builds.
"""

import json
import os
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.conversion.megatron_model import open_megatron
from megatron_sppo.errors import ConversionError
from megatron_sppo.verification import layerwise
from megatron_sppo.verification import verify as verification
from megatron_sppo.verification.logits import hf_logits, prompt_logits
from megatron_sppo.verification.probes import prompt_token_ids
from tests.commands import run_here
from tests.e2e.forked import run_forked
from tests.families import FAMILIES, family_model
from tests.models import tiny_llama

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert.py"
LLAMA31 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied, one key/value head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "untied, wide heads, Llama 3.1 RoPE": {"head_dim": 32, "rope_parameters": LLAMA31},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "odd vocabulary, other epsilon and base": {
        "vocab_size": 263,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_theta": 77.0, "rope_type": "default"},
    },
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, overrides: dict[str, Any]) -> None:
    hf = tiny_llama(tmp_path / "hf", scale=0.3, **overrides)
    import_checkpoint(hf, tmp_path / "megatron")
    report = verification.verify(hf, tmp_path / "megatron", dtype="float32")
    assert report["faults"] == []
    assert report["logits"]["prompts"] >= 8
    assert report["logits"]["max_logit"] > 1.0, "logits near zero would agree whatever the model"
    assert report["logits"]["max_abs"] <= 1e-4 * report["logits"]["max_logit"]
    verification.enforce(report)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((family, {}) for family in FAMILIES), ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1})],
)
def test_layer_by_layer_the_logits_are_those_of_the_whole_models(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    """Both sides of the layer-wise path against Hugging Face's whole model: float32 sums in another order."""
    hf = family_model(tmp_path / "hf", family, **overrides)
    import_checkpoint(hf, tmp_path / "megatron")
    opened = open_megatron(tmp_path / "megatron")
    token_ids = prompt_token_ids(
        hf,
        None,
        vocab_size=opened.architecture.vocab_size,
        max_position_embeddings=opened.architecture.max_position_embeddings,
    )
    attention = "eager" if opened.architecture.attention_softcap is not None else None
    whole = prompt_logits(hf_logits(hf, "float32", attention), token_ids, "whole")
    layers: list[int] = []
    with torch.no_grad(), layerwise.megatron_logits(opened, "float32", on_layer=lambda: layers.append(1)) as megatron:
        reference = layerwise.hf_logits(hf, torch.float32, attention=attention, on_layer=lambda: layers.append(2))
        tokens = layerwise.padded(token_ids)
        sides = reference(tokens), megatron(tokens)
    assert sorted(layers) == [1, 1, 1, 2, 2, 2]
    for row, (ids, expected) in enumerate(zip(token_ids, whole, strict=True)):
        for side in sides:
            assert (side[row, : len(ids)] - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


def test_verify_by_layer_passes_and_finds_what_the_whole_path_finds(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf", scale=0.3)
    import_checkpoint(hf, tmp_path / "megatron")
    report = verification.verify(hf, tmp_path / "megatron", dtype="float32", layerwise=True)
    assert report["faults"] == [] and report["logits"]["layerwise"] and report["logits"]["prompts"] == 8
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0] += 1.0
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    by_layer, whole = (
        verification.verify(hf, tmp_path / "megatron", dtype="float32", layerwise=chosen) for chosen in (True, False)
    )
    assert len(by_layer["faults"]) == len(whole["faults"]) > 1
    for name in ("max_abs", "mean_abs", "mean_kl", "max_kl"):
        assert by_layer["logits"][name] == pytest.approx(whole["logits"][name], rel=1e-3)


def test_what_does_not_fit_into_half_of_the_memory_is_run_by_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")
    nbytes = sum(tensor.nbytes for tensor in load_file(hf / "model.safetensors").values())
    for free, expected in ((2 * nbytes, False), (2 * nbytes - 2, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        report = verification.verify(hf, tmp_path / "megatron", dtype="float32")
        assert report["logits"]["layerwise"] is expected


def test_a_common_state_with_objects_is_not_loaded(tmp_path: Path) -> None:
    """The host would run its pickle: the weights are then read without it, layer by layer."""
    hf = tiny_llama(tmp_path / "hf")
    iteration = import_checkpoint(hf, tmp_path / "megatron")
    torch.save({"iteration": 0, "args": Fraction(1, 2)}, iteration / "common.pt")
    (iteration / "manifest.json").unlink()
    report = verification.verify(hf, iteration, dtype="float32")
    assert report["logits"]["layerwise"] and report["faults"] == []


def test_a_tokenizer_that_encodes_otherwise_is_found_by_its_probes(tmp_path: Path) -> None:
    """A carried file that no hash covers: here the hash in model.json is of the other tokenizer, as a bug would do."""
    hf = tiny_llama(tmp_path / "hf")
    iteration = import_checkpoint(hf, tmp_path / "megatron")
    path = iteration / "hf" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    (iteration / "manifest.json").unlink()
    report = verification.verify(hf, tmp_path / "megatron" / "iter_0000000")
    assert any("treat" in fault and "texts differently" in fault for fault in report["faults"])
    assert "e\u0301 \u00e9 \ufb01" not in report["tokenizer"]["different_probes"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [({"rms_norm_eps": 1e-2}, "layernorm_epsilon"), ({"rope_parameters": {"rope_theta": 50.0}}, "rotary_base")],
)
def test_the_same_weights_under_another_config_are_a_fault(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")
    other = tiny_llama(tmp_path / "other", **change)
    report = verification.verify(other, tmp_path / "megatron")
    with pytest.raises(ConversionError, match=fault):
        verification.enforce(report)


def test_a_changed_weight_is_found_in_tensors_and_in_logits(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf", scale=0.3)
    import_checkpoint(hf, tmp_path / "megatron")
    tensors = load_file(hf / "model.safetensors")
    # Query heads 0 and 1 exchanged: the mistake that a wrong order of fused rows would make.
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.cat([query[8:16], query[:8], query[16:]])
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    report = verification.verify(hf, tmp_path / "megatron", dtype="float32")
    assert report["tensors"]["different"] == ["model.layers.1.self_attn.q_proj.weight"]
    assert len([fault for fault in report["faults"] if "logits" in fault]) == 1
    with pytest.raises(ConversionError, match=r"q_proj.*more: --json"):
        verification.enforce(report)


def test_import_export_verify_from_the_command_line(tmp_path: Path) -> None:
    hf, megatron, out, report = tmp_path / "hf", tmp_path / "megatron", tmp_path / "out", tmp_path / "report.json"
    tiny_llama(hf, dtype="bfloat16")
    assert run_forked(TOOL, ["import", "--hf", hf, "--megatron", megatron]).returncode == 0
    exported = run_here("tools/convert.py", "export", "--megatron", megatron / "iter_0000000", "--hf", out)
    assert exported.returncode == 0, exported.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in hf.iterdir()}
    verified = run_forked(TOOL, ["verify", "--hf", out, "--megatron", megatron, "--json", report])
    assert verified.returncode == 0, verified.stderr
    assert "21 of 21 are equal bit for bit" in verified.stderr
    assert json.loads(report.read_text())["faults"] == []
    # Another model's tokenizer and chat template, the same weights.
    (out / "chat_template.jinja").write_text("other")
    refused = run_here("tools/convert.py", "verify", "--hf", out, "--megatron", megatron)
    assert refused.returncode == 2
    assert "chat_template.jinja differs" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["import", "--hf", "absent", "--megatron", "m"], "absent is not a directory"),
        (["import", "--hf", "hf"], "--megatron"),
        (["import", "--hf", "hf", "--megatron", "m", "--dtype", "int8"], "dtype"),
        (["export", "--megatron", "hf", "--hf", "out"], "is a Hugging Face model"),
        (["export", "--megatron", "absent", "--hf", "out"], "absent is not a directory"),
        (["verify", "--hf", "hf", "--megatron", "absent"], "absent is not a directory"),
        (["export", "--megatron", "hf", "--hf", "."], "is the directory that you are in"),
        (["export", "--megatron", "hf", "--hf", ""], "is the directory that you are in"),
        (["export", "--megatron", "hf", "--adapter", "."], "is the directory that you are in"),
        (["export", "--megatron", "hf", "--hf", ".", "--merge", "--base", "hf"], "is the directory that you are in"),
        (["transmogrify"], "transmogrify"),
        ([], "command is missing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], named: str) -> None:
    tiny_llama(tmp_path / "hf")
    paths = {"absent", "hf", "m", "out"}
    result = run_here("tools/convert.py", *(tmp_path / a if a in paths else a for a in arguments))
    assert result.returncode == 2, result.stderr
    assert named in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["hf"]


@pytest.mark.parametrize("command", ["import", "export", "verify"])
def test_help_says_what_each_flag_means(command: str) -> None:
    result = run_here("tools/convert.py", command, "--help")
    assert result.returncode == 0
    for flag in ("--hf", "--megatron"):
        assert flag in result.stdout
