"""Proves tools/generate_rollouts.py as a user meets it: exit codes, one line for what can be mended, a server run.

The engine is a local HTTP server; vLLM itself is in test_self_play_vllm.py.
"""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from megatron_sppo.rollout.records import read_manifest, read_rollouts
from tests.commands import REPOSITORY, run_here
from tests.e2e.forked import run_forked
from tests.unit.rollout.test_server import FakeVllm, answer_to

TOOL = "tools/generate_rollouts.py"


def run(*flags: Any) -> "subprocess.CompletedProcess[str]":
    return run_here(TOOL, *flags)


@pytest.fixture
def flags(tiny_llama_dir: Path, tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"What is {i}?", "split": "train"} for i in range(5)] + [{"prompt": ""}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "rollouts"
    return {"model": tiny_llama_dir, "prompts": prompts, "output": output, "num-responses": 2, "max-tokens": 8}


def spelled(flags: dict[str, Any]) -> list[Any]:
    return [token for name, value in flags.items() for token in (f"--{name}", value)]


def test_a_server_run_writes_rollouts_and_reports_as_json(flags: dict[str, Any]) -> None:
    def within_vocabulary(body: dict[str, Any], number: int) -> dict[str, Any]:
        reply = FakeVllm.good_reply(body)
        for choice in reply["choices"]:
            choice["token_ids"] = [3 + choice["index"], 2]
        return reply

    server = FakeVllm(within_vocabulary, max_model_len=512)
    try:
        done = run_forked(REPOSITORY / TOOL, [*spelled(flags), "--shard-size", 2, "--server", server.url, "--json"])
        assert done.returncode == 0, done.stderr
        again = run(*spelled(flags), "--shard-size", 2, "--server", server.url)
    finally:
        server.close()
    report = json.loads(done.stdout)
    assert (report["num_prompts"], report["num_shards"], report["num_quarantined"]) == (5, 3, 1)
    groups = list(read_rollouts(flags["output"]))
    assert [[response.token_ids for response in group.responses] for group in groups] == [[(3, 2), (4, 2)]] * 5
    assert read_manifest(flags["output"]).quarantined[0]["prompt_id"] == "row-6"
    assert again.returncode == 0
    asked = [body for body in server.bodies if "prompt_logprobs" in body]
    assert len(asked) == 1 and len(server.bodies) == 5 + len(asked)
    assert "that it holds the weights of --model is not proven" in done.stderr


def test_answers_that_run_on_and_are_cut_are_said_by_both_tools(flags: dict[str, Any], tmp_path: Path) -> None:
    """Each answer goes through <|im_end|> and <|im_start|> (ids 2 and 1), as those of a server that does not stop."""

    def running_on(body: dict[str, Any], number: int) -> dict[str, Any]:
        reply = FakeVllm.good_reply(body)
        for choice in reply["choices"]:
            choice |= {"token_ids": [70 + choice["index"], 2, 1, 71], "finish_reason": "length"}
        return reply

    server = FakeVllm(running_on, max_model_len=512)
    try:
        done = run(*spelled(flags), "--server", server.url)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    assert "10 of 10 (100%) answers were cut at max_tokens" in done.stderr
    assert "10 of 10 (100%) answers hold a turn marker" in done.stderr
    score = ["--rollouts", flags["output"], "--judge", "rules:concise", "--output", tmp_path / "dataset"]
    scored = run_here("tools/score_pairrm.py", *score, "--allow-no-signal")
    assert scored.returncode == 0, scored.stderr
    assert "10 of 10 (100%) answers hold a turn marker" in scored.stderr


def test_a_server_of_another_model_is_refused(flags: dict[str, Any]) -> None:
    """Its ids are 1000 and above; the model has 259."""
    assert answer_to([1, 100], 0)[0] >= 259
    server = FakeVllm(max_model_len=512)
    server.fault = lambda body, number: (
        FakeVllm.good_reply({**body, "prompt": [1, 100]})
        | {
            "choices": [
                {**choice, "prompt_token_ids": body["prompt"]}
                for choice in FakeVllm.good_reply({**body, "prompt": [1, 100]})["choices"]
            ]
        }
    )
    try:
        done = run(*spelled(flags), "--server", server.url)
    finally:
        server.close()
    assert done.returncode == 2
    assert "The server runs another model" in done.stderr.splitlines()[-1]


BAD_INPUT = {
    "no model": ({"model": "no/such/model"}, "hf download no/such/model"),
    "no prompts": ({"prompts": "no.jsonl"}, "no.jsonl does not exist"),
    "no split": ({"split": "test"}, "Use --split with one of: train"),
    "temperature 0": ({"temperature": 0}, "--temperature above 0"),
    "answers over the context": ({"max-tokens": 512}, "Use a smaller --max-tokens"),
    "no server": ({"server": "http://127.0.0.1:9"}, "no server answers"),
    "unknown preset": ({"preset": "mine"}, "preset"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(flags: dict[str, Any], name: str) -> None:
    change, message = BAD_INPUT[name]
    done = run(*spelled({**flags, **change}))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("generate_rollouts.py: error: ")
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (Path(flags["output"]) / "manifest.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_remedy_names_both_ways(flags: dict[str, Any]) -> None:
    done = run(*spelled(flags))
    assert done.returncode == 2
    assert "or use --server URL" in done.stderr.splitlines()[-1]
