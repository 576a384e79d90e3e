"""Proves: two real vLLM servers on the CPU sample for two iterations of a run, each iteration's weights given to them
in place and proven to the bit.

The model is tiny and ties its embedding to its output layer, of which vLLM on a CPU keeps an old copy when weights are
loaded: without our extension's mending the second iteration could not be sampled. What is refused of servers that lie,
die or come back is in tests/unit/rollout/test_hand_over.py.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

from tests.commands import REPOSITORY
from tests.e2e.forked import Forked
from tests.models import tiny_llama
from tests.vllm_servers import vllm_servers

SHAPE = {"dtype": "bfloat16", "tie_word_embeddings": True, "head_dim": 32, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1}
CONFIG = """
run: {iterations: 2, max_prompts_per_iteration: 4}
rollout: {num_responses: 2, max_tokens: 12, rollout_options: {server_seeds: false, max_model_len: 256}}
scoring: {judge: rules:concise, allow_no_signal: true}
evaluation: {heldout_prompts: 0, inspected_prompts: 0}
training: {eta: 10, lr: 1.0e-3, lr_decay_style: constant, micro_batch_size: 2, global_batch_size: 4}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "start", scale=0.2, **SHAPE)


@pytest.fixture(scope="module")
def urls(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two servers that were started with the start model."""
    with vllm_servers(model, tmp_path_factory.mktemp("logs"), count=2) as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_iterations_are_sampled_by_two_servers_whose_weights_are_replaced_and_proven(
    model: Path, urls: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i} and {i}?"}) + "\n" for i in range(10)))
    (tmp_path / "run.yaml").write_text(CONFIG)
    flags = ["--config", tmp_path / "run.yaml", "--model", model, "--prompts", prompts, "--output", tmp_path / "run"]
    loop = Forked(REPOSITORY / "tools/self_play.py", [*flags, "--server", *urls])
    _, told = loop.communicate(timeout=1200)
    assert loop.poll() == 0, told[-3000:]

    run = tmp_path / "run"
    num_weights = len(json.loads(header(model / "model.safetensors"))) - 1  # and the metadata
    proof = f"{num_weights} of {num_weights} weights are equal to the bit"
    for stage, verb, directory in (
        ("iter_1-rollouts", "holds", model),
        ("iter_2-rollouts", "has loaded", run / "iter_1/hf"),
    ):
        log = (run / "logs" / f"{stage}.log").read_text()
        for url in urls:
            assert f"server {url} {verb} {directory}: {proof}" in log, (stage, log[-2000:])


def header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
