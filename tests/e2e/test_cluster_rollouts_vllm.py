"""Proves the real engine on a real Ray of three nodes: killed in mid-shard, it writes the bytes of one process; and
engines of a pool compute with the adapter of each iteration, as `peft` does.

vLLM on CPU and a tiny model; what else can go wrong with a pool is in test_cluster_rollouts.py, with a fake sampler.
"""

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `cluster` is not installed")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

from megatron_sppo.rollout.records import read_manifest, read_rollouts
from tests.adapters import random_adapter
from tests.e2e.forked import Forked
from tests.e2e.ray_cluster import ThreeNodes, kill, three_nodes, wait_until
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
NUM_SHARDS = 8


@pytest.fixture(scope="module")
def nodes() -> Iterator[ThreeNodes]:
    yield from three_nodes(forks=False)


def begin(model: Path, output: Path, *more: str) -> Forked:
    flags = [
        *("--model", model, "--output", output, "--prompts", ROOT / "examples/data/prompts.jsonl"),
        *("--limit", 2 * NUM_SHARDS, "--shard-size", 2, "--num-responses", 4, "--max-tokens", 192),
        *("--max-num-seqs", 16, *more),
    ]
    return Forked(ROOT / "tools/generate_rollouts.py", flags)


def ended(process: Forked) -> None:
    _, err = process.communicate(timeout=900)
    assert process.poll() == 0, err


def test_a_pool_s_engines_compute_with_each_iteration_s_adapter(nodes: ThreeNodes, tmp_path: Path) -> None:
    """Greedy, in float32, by one engine, then two; a sampler starts where its engine is proven (vllm_engine.py).

    The one imports vLLM in a worker that Ray has started, all others find it imported (ray_cluster.py).
    """
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    shape = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    base = tiny_llama(tmp_path / "base", scale=0.1, **shape)
    greedy = ("--ray", nodes.address, "--num-responses", "1", "--temperature", "0")
    greedy += ("--max-tokens", "12", "--allow-no-signal", "--limit", "8", "--dtype", "float32")
    answers = []
    for number, workers in ((1, "1"), (2, "2")):
        adapter = random_adapter(tmp_path / f"iter_{number}/adapter", base, scale=0.1, seed=number)
        output = tmp_path / f"iter_{number}/rollouts"
        ended(begin(base, output, "--adapter", str(adapter), "--workers", workers, *greedy))
        nodes.fork_workers()
        assert read_manifest(output).adapter == str(adapter)
        policy = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        policy = peft.PeftModel.from_pretrained(policy, adapter).eval()
        answers.append([])
        for group in read_rollouts(output):
            prompt = torch.tensor([group.prompt_token_ids])
            with torch.no_grad():
                out = policy.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=[2])
            answers[-1].append(group.responses[0].token_ids)
            assert tuple(out[0, prompt.shape[1] :].tolist()) == answers[-1][-1]
    assert len(answers[0]) == 8 and answers[0] != answers[1]


def test_engines_a_node_and_the_driver_are_killed_and_the_bytes_are_those_of_one_process(
    nodes: ThreeNodes, tmp_path: Path
) -> None:
    # vLLM's attention on CPU knows heads of 32 and 64.
    model = tiny_llama(tmp_path / "model", dtype="bfloat16", head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    alone, output = tmp_path / "alone", tmp_path / "rollouts"
    ended(begin(model, alone))

    def num_done() -> int:
        return len(list(output.glob("shard-*.jsonl")))

    driver = begin(model, output, "--ray", nodes.address)
    try:
        wait_until(lambda: num_done() >= 1 or driver.poll() is not None, "a shard", seconds=300)
        time.sleep(0.2)
        kill(nodes.actors()[0])
        nodes.remove_a_node()
        wait_until(lambda: num_done() >= 3 or driver.poll() is not None, "three shards", seconds=300)
    finally:
        kill(driver.pid)
    _, err = driver.communicate()
    assert 3 <= num_done() < NUM_SHARDS, err
    wait_until(lambda: not nodes.actors(), "the end of the dead driver's engines")
    ended(begin(model, output, "--ray", nodes.address, "--workers", "1"))
    assert len(read_manifest(output).shards) == NUM_SHARDS
    for path in alone.glob("shard-*.jsonl"):
        assert path.read_bytes() == (output / path.name).read_bytes(), path.name
