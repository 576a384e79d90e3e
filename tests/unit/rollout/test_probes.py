"""Proves: the probes' log-probabilities are those of transformers in float32, from weights that stay in the files."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file, save_file

from megatron_sppo.checkpoints.peft_files import open_peft_adapter
from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.errors import ConversionError
from megatron_sppo.rollout import probes as probes_module
from megatron_sppo.rollout.probes import TOLERANCE, Probes, compute_probes
from tests.adapters import random_adapter
from tests.models import MIXTURES, tiny_llama

KINDS: dict[str, dict[str, object]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3_moe": MIXTURES["qwen3_moe"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_log_probabilities_are_those_of_the_model_in_float32(kind: str, dtype: str, tmp_path: Path) -> None:
    model_dir = tiny_llama(tmp_path / "model", scale=0.2, dtype=dtype, **KINDS[kind])
    probes = compute_probes(model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for ids, found in zip(probes.token_ids, probes.log_probs, strict=True):
        with torch.no_grad():
            truth = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        expected = truth[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert torch.tensor(found, dtype=torch.float64) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_with_an_adapter_they_are_those_of_peft_on_the_model_in_float32(dtype: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_llama(tmp_path / "base", scale=0.2, dtype=dtype)
    directory = random_adapter(tmp_path / "adapter", base, use_rslora=True)
    before = (base / "model.safetensors").read_bytes()
    probes = compute_probes(base, adapter=open_peft_adapter(directory))
    assert (base / "model.safetensors").read_bytes() == before
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, directory).eval()
    for ids, found in zip(probes.token_ids, probes.log_probs, strict=True):
        with torch.no_grad():
            truth = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        expected = truth[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert torch.tensor(found, dtype=torch.float64) == pytest.approx(expected, abs=1e-4)
    assert probes.distance(compute_probes(base).log_probs) > TOLERANCE


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_are_added_to_the_expert_s_own_rows(kind: str, tmp_path: Path) -> None:
    """The truth: scaling * B @ A added to the weights in the file, of a model that transformers then loads."""
    base = tiny_llama(tmp_path / "base", scale=0.2, **MIXTURES[kind])
    targets = ("q_proj", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
    present = targets[:4] if kind == "mixtral" else (targets[0], *targets[4:])
    directory = random_adapter(tmp_path / "adapter", base, rank=2, alpha=1, targets=present)
    probes = compute_probes(base, adapter=open_peft_adapter(directory))
    weights, factors = load_file(base / "model.safetensors"), load_file(directory / "adapter_model.safetensors")
    for name in [*weights]:
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in factors:
            weights[name] += 0.5 * factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    assert probes.distance(compute_probes(merged).log_probs) < 1e-4
    assert probes.distance(compute_probes(base).log_probs) > TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_lies_within_the_tolerance_and_other_weights_far_beyond(kind: str, tmp_path: Path) -> None:
    """bfloat16's rounding as transformers computes, against two models that differ in their seeds alone."""
    one, other = (
        tiny_llama(tmp_path / str(seed), seed=seed, scale=0.2, dtype="bfloat16", **KINDS[kind]) for seed in (0, 1)
    )
    probes = compute_probes(one)
    model = transformers.AutoModelForCausalLM.from_pretrained(one, dtype=torch.bfloat16).eval()
    rounded = []
    for ids in probes.token_ids:
        with torch.no_grad():
            values = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        rounded.append(values[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist())
    assert probes.distance(rounded) < TOLERANCE
    assert probes.distance(compute_probes(other).log_probs) > 10 * TOLERANCE


def test_the_distance_is_in_standard_deviations_of_the_truth() -> None:
    """Truth 0 and 2: mean 1, standard deviation 1. Both off by 0.3: the root mean square is 0.3."""
    probes = Probes(token_ids=((1, 2), (1, 2)), log_probs=((0.0,), (2.0,)))
    assert probes.distance([[0.3], [1.7]]) == pytest.approx(0.3)
    assert probes.distance([[0.0], [2.0]]) == 0
    assert probes.distance([[math.nan], [2.0]]) == math.inf


def test_the_weights_stay_in_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after computing every weight lies in the mapped file: what was widened was given back."""
    model_dir = tiny_llama(tmp_path / "model", dtype="bfloat16")
    loaded = []

    def load(*arguments: Any, **settings: Any) -> Any:
        loaded.append(load_pretrained(*arguments, **settings))
        assert_mapped(loaded[0])
        return loaded[0]

    def assert_mapped(model: Any) -> None:
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(f"{model_dir}/model.safetensors")]
        for name, parameter in model.named_parameters():
            place = parameter.data_ptr()
            assert any(int(start, 16) <= place < int(end, 16) for start, end in ranges), name

    monkeypatch.setattr(probes_module, "load_pretrained", load)
    compute_probes(model_dir)
    assert_mapped(loaded[0])
    assert all(parameter.dtype == torch.bfloat16 for parameter in loaded[0].parameters())


def test_a_directory_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model_dir = tiny_llama(tmp_path / "model")
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"lacks model\.norm\.weight"):
        compute_probes(model_dir)
