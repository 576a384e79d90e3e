"""Proves the KL estimate against log-probabilities by the naive way: one answer at a time, no padding, a log-softmax.

Not proved here: that the samples are the model's own, which the sampler's tests prove.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sppo.checkpoints.model_files import model_hash
from megatron_sppo.checkpoints.peft_files import open_peft_adapter
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.evaluation.estimates import Resampling
from megatron_sppo.evaluation.kl import answer_log_probs, kl_to_baseline
from megatron_sppo.evaluation.players import read_field
from megatron_sppo.judge.config import EvaluateConfig
from megatron_sppo.rollout.records import read_manifest, write_manifest
from tests.adapters import random_adapter
from tests.models import tiny_llama
from tests.unit.selfplay.synthetic import group, write_rollouts

PROMPTS = ("p", "q", "r")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [tiny_llama(folder / name, seed=seed) for seed, name in enumerate(("base", "policy"))]


@pytest.fixture
def config(models, tmp_path):
    """Players "base" and "policy" whose manifests name the two models, and "x" from a file."""
    for directory, name in zip(models, ("base", "policy"), strict=True):
        groups = [group(p, [f"{name} of {p}", f"longer {name} answer"], prompt=f"Why {p}?") for p in PROMPTS]
        write_rollouts(tmp_path / name, groups)
        manifest = read_manifest(tmp_path / name)
        write_manifest(tmp_path / name, replace(manifest, model=str(directory), model_hash=model_hash(directory)))
    (tmp_path / "x.json").write_text('[{"instruction": "Why p?", "output": "x"}]')
    players = (f"base={tmp_path / 'base'}", f"policy={tmp_path / 'policy'}", f"x={tmp_path / 'x.json'}")
    return EvaluateConfig(judge="rules:concise", output=tmp_path / "r.json", players=players, kl=True)


def naive(model, prompt_ids, token_ids):
    """Sum log p of each token by a forward of its own."""
    total = 0.0
    for place, token in enumerate(token_ids):
        ids = torch.tensor([[*prompt_ids, *token_ids[:place]]])
        total += torch.log_softmax(model(ids).logits[0, -1].double(), dim=-1)[token].item()
    return total


def test_log_probs_are_those_of_one_forward_a_token(models):
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32).eval()
    asked = group("p", ["Short.", "A much longer answer, padded nowhere."])
    with torch.inference_mode():
        expected = [naive(model, asked.prompt_token_ids, answer.token_ids) for answer in asked.responses]
    assert answer_log_probs(model, asked) == pytest.approx(np.array(expected), abs=1e-3)


def test_the_kl_is_the_mean_log_ratio_of_the_player_s_own_answers(config, models):
    field = read_field(config)
    found = kl_to_baseline(field, PROMPTS, Resampling(resamples=20, seed=0))
    assert set(found) == {"policy"}
    base, policy = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in models)
    groups = [field.players[1].groups[p] for p in PROMPTS]
    expected = np.mean([answer_log_probs(policy, one) - answer_log_probs(base, one) for one in groups])
    assert found["policy"]["kl_to_baseline"]["mean"] == pytest.approx(expected, abs=1e-4)
    assert found["policy"]["kl_estimated_from"]["sampling"] == {"temperature": 1.0, "top_p": 1.0}


def test_a_player_that_sampled_with_an_adapter_is_base_and_adapter(config, models, tmp_path):
    """Its base is the baseline's model: without the adapter the KL would be 0."""
    peft = pytest.importorskip("peft")
    directory = random_adapter(tmp_path / "adapter", models[0])
    adapter_hash = open_peft_adapter(directory).adapter_hash
    manifest = read_manifest(tmp_path / "policy")
    of_base = replace(manifest, model=str(models[0]), model_hash=model_hash(models[0]), adapter=str(directory))
    write_manifest(tmp_path / "policy", replace(of_base, adapter_hash=adapter_hash))
    field = read_field(config)
    found = kl_to_baseline(field, PROMPTS, Resampling(resamples=20, seed=0))["policy"]["kl_to_baseline"]["mean"]
    base = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32).eval()
    groups = [field.players[1].groups[p] for p in PROMPTS]
    without = [answer_log_probs(base, one) for one in groups]
    policy = peft.PeftModel.from_pretrained(base, directory).eval()
    expected = np.mean([answer_log_probs(policy, one) - before for one, before in zip(groups, without, strict=True)])
    assert found == pytest.approx(expected, abs=1e-3) and abs(found) > 0.1
    write_manifest(tmp_path / "policy", replace(of_base, adapter_hash="0" * 64))
    with pytest.raises(DataError, match="holds another adapter than the one that sampled policy"):
        kl_to_baseline(read_field(config), PROMPTS, Resampling(resamples=20, seed=0))


def test_a_model_that_is_gone_or_another_is_told(config, tmp_path, models):
    manifest = read_manifest(tmp_path / "policy")
    write_manifest(tmp_path / "policy", replace(manifest, model=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="gone, the model that sampled policy, is not there. Leave --kl out"):
        kl_to_baseline(read_field(config), PROMPTS, Resampling(resamples=2, seed=0))
    write_manifest(tmp_path / "policy", replace(manifest, model=str(models[0])))
    with pytest.raises(DataError, match="holds another model than the one that sampled policy"):
        kl_to_baseline(read_field(config), PROMPTS, Resampling(resamples=2, seed=0))
    with pytest.raises(ConfigError, match="x is a file of answers"):
        kl_to_baseline(read_field(replace(config, baseline="x")), PROMPTS, Resampling(resamples=2, seed=0))
