"""Proves: tools/convert.py as a user runs it: exit codes, one line of error, `verify` against transformers.

The logits' truth is transformers' LlamaForCausalLM; the Megatron model is the one that training builds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo import verification
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.errors import ConversionError
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


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


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
    assert run("import", "--hf", hf, "--megatron", megatron).returncode == 0
    assert run("export", "--megatron", megatron / "iter_0000000", "--hf", out).returncode == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in hf.iterdir()}
    verified = run("verify", "--hf", out, "--megatron", megatron, "--json", report)
    assert verified.returncode == 0, verified.stderr
    assert "21 of 21 are equal bit for bit" in verified.stderr
    assert json.loads(report.read_text())["faults"] == []
    # Another model's tokenizer and chat template, the same weights.
    (out / "chat_template.jinja").write_text("other")
    refused = run("verify", "--hf", out, "--megatron", megatron)
    assert refused.returncode == 2
    assert "chat_template.jinja differs" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["import", "--hf", "absent", "--megatron", "m"], "absent is no directory"),
        (["import", "--hf", "hf"], "--megatron"),
        (["import", "--hf", "hf", "--megatron", "m", "--dtype", "int8"], "dtype"),
        (["export", "--megatron", "hf", "--hf", "out"], "is a Hugging Face model"),
        (["export", "--megatron", "absent", "--hf", "out"], "absent is no directory"),
        (["verify", "--hf", "hf", "--megatron", "absent"], "absent is no directory"),
        (["transmogrify"], "transmogrify"),
        ([], "command is missing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], named: str) -> None:
    tiny_llama(tmp_path / "hf")
    paths = {"absent", "hf", "m", "out"}
    result = run(*(tmp_path / a if a in paths else a for a in arguments))
    assert result.returncode == 2, result.stderr
    assert named in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["hf"]


@pytest.mark.parametrize("command", ["import", "export", "verify"])
def test_help_says_what_each_flag_means(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    for flag in ("--hf", "--megatron"):
        assert flag in result.stdout
