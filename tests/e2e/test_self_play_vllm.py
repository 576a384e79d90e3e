"""Proves: the whole loop for real, once: SmolLM2 answers by vLLM on the CPU, two torchrun ranks train it, and what
comes out of the iteration is sampled by vLLM again and read by transformers.

Two updates at a tiny scale: nothing is said of how much is learnt. That is `make demo`. What log-probabilities
the sampled ids have under the Megatron model is proved with the converter; that a shard which is sampled again has the
same bytes, by test_cluster_rollouts_vllm.py.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

import torch
from transformers import AutoModelForCausalLM

from megatron_sppo.rollout.chat_template import ChatTokenizer
from megatron_sppo.rollout.records import Response, RolloutGroup, read_rollouts
from tests.e2e.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS, NUM_RESPONSES, MAX_TOKENS, END_OF_TURN = 2, 2, 12, 2
CONFIG = f"""
run: {{iterations: 1, max_prompts_per_iteration: {NUM_PROMPTS}, training_processes: 2}}
rollout:
  {{num_responses: {NUM_RESPONSES}, max_tokens: {MAX_TOKENS}, rollout_options: {{max_model_len: 128, dtype: float32}}}}
scoring: {{judge: rules:concise}}
evaluation: {{heldout_prompts: 2, eval_num_responses: 1, inspected_prompts: 0}}
training:
  {{params_dtype: float32, eta: 10, lr: 1.0e-5, lr_decay_style: constant, micro_batch_size: 1, global_batch_size: 2}}
"""


@pytest.fixture(scope="module")
def run(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An iteration of self-play -> its directory."""
    directory = tmp_path_factory.mktemp("self_play")
    (directory / "run.yaml").write_text(CONFIG)
    flags = ["--config", directory / "run.yaml", "--model", smollm2_dir, "--output", directory / "run"]
    flags += ["--prompts", ROOT / "examples/data/prompts.jsonl"]
    loop = Forked(ROOT / "tools/self_play.py", flags, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    _, told = loop.communicate(timeout=1500)
    assert loop.poll() == 0, told[-3000:]
    return directory / "run"


def groups_of(run: Path) -> list[RolloutGroup]:
    return list(read_rollouts(run / "iter_1/rollouts"))


def responses_of(run: Path) -> Iterator[Response]:
    for group in groups_of(run):
        yield from group.responses


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_iteration_with_vllm_and_two_training_ranks_gives_a_model_that_answers(smollm2_dir: Path, run: Path) -> None:
    metrics = [json.loads(line) for line in (run / "iter_1/checkpoint/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == NUM_PROMPTS * NUM_RESPONSES / 2
    assert metrics[0]["sppo/ref_drift_step0"] == 0
    answers = (run / "iter_1/eval/rollouts/shard-00000.jsonl").read_text().splitlines()
    assert len(answers) == 2 and all(json.loads(line)["responses"][0]["token_ids"] for line in answers)
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(run / "iter_1/hf").state_dict()
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    assert all(trained[name].dtype == torch.float32 for name in base)  # as it was trained


def test_every_prompt_has_k_responses_that_differ_within_the_limit(run: Path) -> None:
    assert len(groups_of(run)) == NUM_PROMPTS
    for group in groups_of(run):
        assert len(group.responses) == NUM_RESPONSES
        assert len({response.token_ids for response in group.responses}) > 1
    assert all(1 <= len(response.token_ids) <= MAX_TOKENS for response in responses_of(run))


def test_the_end_of_turn_token_is_kept_exactly_where_the_model_stopped(run: Path) -> None:
    for response in responses_of(run):
        assert (response.token_ids[-1] == END_OF_TURN) == (response.finish_reason == "stop")
        assert END_OF_TURN not in response.token_ids[:-1]
        assert response.finish_reason == "stop" or len(response.token_ids) == MAX_TOKENS


def test_texts_are_the_decoded_ids_and_prompts_the_templated_messages(run: Path, smollm2_dir: Path) -> None:
    tokenizer = ChatTokenizer(smollm2_dir)
    for group in groups_of(run):
        assert group.prompt_text is not None
        assert group.prompt_text.endswith("<|im_start|>assistant\n")
        assert group.messages[-1]["content"] in group.prompt_text
    for response in responses_of(run):
        # A response cut inside a character ends in a replacement character in one decoder and not in the other.
        assert tokenizer.decode(response.token_ids).rstrip("\ufffd") == response.text.rstrip("\ufffd")
