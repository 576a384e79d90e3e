"""Proves the real thing: SmolLM2 answers by vLLM on CPU, ids are the model's own, a shard repeats to the bit.

What log-probabilities those ids have under the Megatron model is proved with the converter, not here.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

from megatron_sppo.rollout.chat_template import ChatTokenizer
from megatron_sppo.rollout.records import read_manifest, read_rollouts

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS, NUM_RESPONSES, MAX_TOKENS, END_OF_TURN = 6, 3, 24, 2


def generate(model: Path, output: Path) -> "subprocess.CompletedProcess[str]":
    """Run the tool as a user would, in a process of its own: an engine does not leave all of its memory."""
    flags = {
        "--model": model,
        "--prompts": ROOT / "examples/data/prompts.jsonl",
        "--output": output,
        "--num-responses": NUM_RESPONSES,
        "--max-tokens": MAX_TOKENS,
        "--limit": NUM_PROMPTS,
        "--shard-size": 3,
    }
    tokens = [str(token) for pair in flags.items() for token in pair]
    command = [sys.executable, str(ROOT / "tools/generate_rollouts.py"), *tokens]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def rollouts(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("vllm") / "rollouts"
    done = generate(smollm2_dir, output)
    assert done.returncode == 0, done.stderr
    return output


def test_every_prompt_has_k_different_responses_within_the_limit(rollouts: Path) -> None:
    groups = list(read_rollouts(rollouts))
    assert len(groups) == NUM_PROMPTS
    for group in groups:
        assert len({response.token_ids for response in group.responses}) == NUM_RESPONSES
        assert all(1 <= len(response.token_ids) <= MAX_TOKENS for response in group.responses)


def test_the_end_of_turn_token_is_kept_exactly_where_the_model_stopped(rollouts: Path) -> None:
    for group in read_rollouts(rollouts):
        for response in group.responses:
            assert (response.token_ids[-1] == END_OF_TURN) == (response.finish_reason == "stop")
            assert END_OF_TURN not in response.token_ids[:-1]
            assert response.finish_reason == "stop" or len(response.token_ids) == MAX_TOKENS


def test_texts_are_the_decoded_ids_and_prompts_the_templated_messages(rollouts: Path, smollm2_dir: Path) -> None:
    tokenizer = ChatTokenizer(smollm2_dir)
    for group in read_rollouts(rollouts):
        assert group.prompt_text is not None
        assert group.prompt_text.endswith("<|im_start|>assistant\n")
        assert group.messages[-1]["content"] in group.prompt_text
        for response in group.responses:
            # A response cut inside a character ends in a replacement character in one decoder and not in the other.
            assert tokenizer.decode(response.token_ids).rstrip("\ufffd") == response.text.rstrip("\ufffd")


def test_a_lost_shard_is_sampled_again_to_the_same_bytes(rollouts: Path, smollm2_dir: Path) -> None:
    manifest = read_manifest(rollouts)
    before = {entry.file: (rollouts / entry.file).read_bytes() for entry in manifest.shards}
    (rollouts / "shard-00001.jsonl").unlink()
    done = generate(smollm2_dir, rollouts)
    assert done.returncode == 0, done.stderr
    assert json.dumps(before["shard-00001.jsonl"].decode()) == json.dumps((rollouts / "shard-00001.jsonl").read_text())
    assert read_manifest(rollouts) == manifest
