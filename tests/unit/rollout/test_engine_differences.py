"""Proves which models vLLM would compute otherwise, by configs as they are published and as they are not.

That vLLM does compute these otherwise, and all others alike: tests/e2e/test_families_vllm.py.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.rollout.engine_differences import check_engine
from megatron_sppo.rollout.generate import generate_rollouts
from megatron_sppo.rollout.policy import Policy
from tests.unit.rollout.fake_sampler import FakeSampler, fake_factory

ALTERNATING = ["sliding_attention", "full_attention"] * 12
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
MINISTRAL = {
    "model_type": "ministral3",
    "rope_parameters": {
        "rope_type": "yarn",
        "original_max_position_embeddings": 16384,
        "llama_4_scaling_beta": 0.1,
        "factor": 16.0,
    },
}
PHI = {"model_type": "phi3", "original_max_position_embeddings": 4096, "rope_scaling": LONGROPE}
GPT_OSS = {"model_type": "gpt_oss", "swiglu_limit": 7.0, "sliding_window": 128, "layer_types": ALTERNATING}
QWEN = {"model_type": "qwen2_moe", "num_hidden_layers": 24, "sliding_window": 32768, "max_window_layers": 21}
V3 = {"model_type": "deepseek_v3", "rope_scaling": YARN, "scoring_func": "sigmoid"}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": ["llama"]},
        {},
        QWEN | {"use_sliding_window": False},
        QWEN | {"use_sliding_window": True, "max_window_layers": 0},
        {"model_type": "phi3", "rope_scaling": None, "sliding_window": 2047},
        GPT_OSS,
        V3,
        V3 | {"model_type": "kimi_k2"},
        V3 | {"rope_scaling": None},  # Moonlight: a GPU's kernels are not meant
        {"model_type": "deepseek_v2", "rope_scaling": YARN},
    ],
)
def test_what_vllm_computes_alike_may_be_of_any_length(config: dict[str, Any]) -> None:
    check_engine(config, tokens=131072, place="config.json")


@pytest.mark.parametrize(
    ("config", "tokens", "words"),
    [
        (QWEN | {"use_sliding_window": True}, 32768, "the window of some layers"),
        (PHI, 4096, "long factors for short sequences"),
        (PHI | {"rope_scaling": LONGROPE | {"type": "su"}}, 4096, "long factors for short sequences"),
        (MINISTRAL, 16384, "leaves out llama_4_scaling_beta"),
        (GPT_OSS | {"layer_types": ALTERNATING[::-1]}, 128, "gives every second layer a window"),
    ],
)
def test_what_it_computes_otherwise_beyond_some_tokens_is_refused_from_there_on(
    config: dict[str, Any], tokens: int, words: str
) -> None:
    check_engine(config, tokens=tokens, place="config.json")
    with pytest.raises(ConfigError, match=rf"{words}.* Use --max-model-len {tokens}\.$"):
        check_engine(config, tokens=tokens + 1, place="config.json")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT_OSS | {"swiglu_limit": 10.0}, r"clamps at 7\.0, not at a swiglu_limit of 10\.0\. Use another model"),
        (V3 | {"rope_interleave": False}, "rotates neighbouring channels"),
        (V3 | {"scoring_func": None}, r'softmax .*\. Add "scoring_func": "sigmoid"'),
        (V3 | {"rope_scaling": None}, "without YaRN it rotates the keys of latent attention otherwise on a CPU"),
    ],
)
def test_what_it_never_computes_alike_is_refused_at_any_length(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_engine(config, tokens=2, place="config.json", has_gpus=lambda: False)


def with_config(directory: Path, model: Path, **settings: Any) -> Path:
    """Copy a model, with other settings in its config.json -> the copy."""
    shutil.copytree(model, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return directory


def test_rollouts_of_such_a_model_are_refused_before_a_sampler_starts(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = {**MINISTRAL, "rope_parameters": {**MINISTRAL["rope_parameters"], "original_max_position_embeddings": 9}}
    model = with_config(tmp_path / "model", tiny_llama_dir, **settings)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 1 plus 1?"}\n')
    config = GenerateConfig(model=model, prompts=prompts, output=tmp_path / "rollouts", num_responses=2, max_tokens=8)
    sampler = FakeSampler()
    with pytest.raises(ConfigError, match=r"beyond 9 tokens, and this run is for \d+: it leaves out llama_4"):
        generate_rollouts(config, make_sampler=fake_factory(sampler))
    assert not sampler.calls and not (tmp_path / "rollouts").exists()
    generate_rollouts(replace(config, model=tiny_llama_dir), make_sampler=fake_factory(sampler))
    assert sampler.calls


def test_a_server_that_was_started_for_longer_sequences_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    policy = Policy(directory=with_config(tmp_path / "model", tiny_llama_dir, **PHI), model_hash="0" * 64, room=64)
    policy.check_engine(4096, "http://one")
    with pytest.raises(
        ConfigError, match=r"and http://one is for 8192: .* Use --max-model-len 4096 to start that server"
    ):
        policy.check_engine(8192, "http://one")
    grows = Policy(directory=with_config(tmp_path / "other", tiny_llama_dir, **MINISTRAL), model_hash="0" * 64, room=64)
    grows.check_engine(131072, "http://one")  # there each sequence's own length counts
