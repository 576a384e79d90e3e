"""Proves the real engine on a real Ray of three nodes: killed in mid-shard, it writes the bytes of one process.

vLLM on CPU and a tiny model; what else can go wrong with a pool is in test_cluster_rollouts.py, with a fake sampler.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `cluster` is not installed")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

from megatron_sppo.rollout.records import read_manifest
from tests.e2e.ray_cluster import ThreeNodes, kill, three_nodes, wait_until
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
NUM_SHARDS = 8


@pytest.fixture(scope="module")
def nodes() -> Iterator[ThreeNodes]:
    yield from three_nodes()


def start(model: Path, output: Path, *more: str) -> "subprocess.Popen[str]":
    command = [
        *(sys.executable, str(ROOT / "tools/generate_rollouts.py"), "--model", str(model), "--output", str(output)),
        *("--prompts", str(ROOT / "examples/data/prompts.jsonl"), "--limit", str(2 * NUM_SHARDS), "--shard-size", "2"),
        *("--num-responses", "4", "--max-tokens", "192", "--max-num-seqs", "16", *more),
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_engines_a_node_and_the_driver_are_killed_and_the_bytes_are_those_of_one_process(
    nodes: ThreeNodes, tmp_path: Path
) -> None:
    # vLLM's attention on CPU knows heads of 32 and 64.
    model = tiny_llama(tmp_path / "model", dtype="bfloat16", head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    alone, output = tmp_path / "alone", tmp_path / "rollouts"
    _, err = (one := start(model, alone)).communicate(timeout=300)
    assert one.returncode == 0, err

    def num_done() -> int:
        return len(list(output.glob("shard-*.jsonl")))

    driver = start(model, output, "--ray", nodes.address)
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
    _, err = (again := start(model, output, "--ray", nodes.address, "--workers", "1")).communicate(timeout=300)
    assert again.returncode == 0, err
    assert len(read_manifest(output).shards) == NUM_SHARDS
    for path in alone.glob("shard-*.jsonl"):
        assert path.read_bytes() == (output / path.name).read_bytes(), path.name
