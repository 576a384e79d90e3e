"""Proves: vLLM on the CPU computes each family as transformers does; where it does not, `rollouts` refuses the model.

The models are what an export writes, byte for byte (tests/unit/conversion). vLLM's CPU kernels take some of them in
bfloat16 alone: there its error is that of transformers' own bfloat16. GPUs were not tried.
"""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

import torch

from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.engine_differences import check_engine
from tests.e2e.forked import run_forked
from tests.families import (
    FAMILIES,
    IN_ENGINE,
    OTHERWISE_IN_ENGINE,
    InEngine,
    engine_model,
    hugging_face_logits,
    token_ids,
)

MODELS: dict[str, tuple[str, InEngine]] = {name: (name, IN_ENGINE.get(name, InEngine())) for name in FAMILIES}
MODELS |= OTHERWISE_IN_ENGINE
# In the tests of every change: a model of each code of vLLM's attention and experts. The others with --all-layouts.
OF_EVERY_CHANGE = (
    "llama",
    "qwen2, window",
    "qwen2_moe, dense between",
    "qwen3_next",
    "qwen3_5_text",
    "glm4_moe, biases, groups, two shared",
    "deepseek_v3",
    "gemma3_text",
    "gpt_oss",
    "ministral3",
    "phi3, longrope of a half",
    *OTHERWISE_IN_ENGINE,
)
TOKENS = token_ids(2)
# Models are inspected here rather than in a process for each, which imports vLLM anew.
SCRIPT = """
import gc, json, sys
import vllm
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

registry._run_in_subprocess = lambda function: function()
asked = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
for line in sys.stdin:
    model, dtype, tokens = json.loads(line)
    llm = None
    try:
        llm = vllm.LLM(
            model=model, dtype=dtype, enforce_eager=True, max_model_len=128, max_num_seqs=4,
            kv_cache_memory_bytes=2**26, disable_log_stats=True,
        )
        answers = llm.generate([{"prompt_token_ids": one} for one in tokens], asked, use_tqdm=False)
        said = [
            [at[token].logprob for at, token in zip(answer.prompt_logprobs[1:], one[1:])]
            for answer, one in zip(answers, tokens)
        ]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print("SAID", json.dumps(said), flush=True)
    llm = answers = None
    gc.collect()
    cleanup_dist_env_and_memory()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, tuple[Path, Any]]:
    """Write the models, run them one after the other in one process -> {name: (directory, what vLLM said)}."""
    root = tmp_path_factory.mktemp("models")
    chosen = MODELS if pytestconfig.getoption("--all-layouts") else {label: MODELS[label] for label in OF_EVERY_CHANGE}
    made = {
        label: engine_model(root / label.replace(" ", "_"), name, engine) for label, (name, engine) in chosen.items()
    }
    lines = "".join(
        json.dumps([str(made[label]), engine.dtype, TOKENS.tolist()]) + "\n" for label, (_, engine) in chosen.items()
    )
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    (root / "script.py").write_text(SCRIPT)
    (root / "lines").write_text(lines)
    done = run_forked(root / "script.py", environment=environment, stdin=root / "lines", timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line.removeprefix("SAID ")) for line in done.stdout.splitlines() if line.startswith("SAID ")]
    return {label: (made[label], words) for label, words in zip(chosen, said, strict=True)}


def cases(names: Iterable[str]) -> list[Any]:
    return [name if name in OF_EVERY_CHANGE else pytest.param(name, marks=pytest.mark.all_layouts) for name in names]


def log_probabilities(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    logits = hugging_face_logits(directory, TOKENS, dtype=dtype).float()
    return logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]


def errors_of(directory: Path, said: list[list[float]]) -> torch.Tensor:
    return (torch.tensor(said) - log_probabilities(directory, torch.float32)).abs()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", cases(name for name in FAMILIES if not MODELS[name][1].refusal))
def test_vllm_computes_as_transformers_does(answers: dict[str, tuple[Path, Any]], name: str) -> None:
    directory, said = answers[name]
    assert isinstance(said, list), said
    check_engine(read_config(directory), tokens=128, place="config.json", has_gpus=lambda: False)
    errors = errors_of(directory, said)
    if MODELS[name][1].dtype == "float32":
        assert errors.max() < 1e-5
    else:
        own = log_probabilities(directory, torch.bfloat16) - log_probabilities(directory, torch.float32)
        assert errors.median() < 2 * own.abs().median()


@pytest.mark.parametrize("name", cases(name for name, engine in IN_ENGINE.items() if engine.refusal))
def test_vllm_refuses_it_itself(answers: dict[str, tuple[Path, Any]], name: str) -> None:
    said = answers[name][1]
    assert isinstance(said, str) and IN_ENGINE[name].refusal in said


@pytest.mark.parametrize("name", OTHERWISE_IN_ENGINE)
def test_what_vllm_computes_otherwise_without_a_word_is_refused(
    answers: dict[str, tuple[Path, Any]], name: str
) -> None:
    directory, said = answers[name]
    assert isinstance(said, list), said
    assert errors_of(directory, said).median() > 0.02, "vLLM computes it now: the rule can go"
    with pytest.raises(ConfigError, match="vLLM does not compute what config.json says"):
        check_engine(read_config(directory), tokens=128, place="config.json", has_gpus=lambda: False)
