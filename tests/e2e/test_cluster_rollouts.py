"""Proves rollouts on a real Ray of three nodes: whatever is killed, every shard once, and the bytes of one process.

The sampler is fake, so that shards take as long as a test wants; test_cluster_rollouts_vllm.py has the real engine.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

from megatron_sppo.cluster.progress import read_progress
from tests.e2e.forked import Forked
from tests.e2e.ray_cluster import ThreeNodes, kill, three_nodes, wait_until
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
NUM_SHARDS = 24


@pytest.fixture(scope="module")
def nodes() -> Iterator[ThreeNodes]:
    yield from three_nodes()


def start(model: Path, output: Path, *more: str, seconds_per_shard: float = 0.5) -> Forked:
    flags = [
        *("--model", model, "--output", output, "--prompts", ROOT / "examples/data/prompts.jsonl"),
        *("--limit", 2 * NUM_SHARDS, "--shard-size", 2, "--num-responses", 3, "--max-tokens", 12, *more),
    ]
    settings = {"FAKE_SECONDS_PER_SHARD": str(seconds_per_shard)}
    return Forked(ROOT / "tests/e2e/fake_rollouts.py", flags, settings)


def ended(process: Forked) -> "subprocess.CompletedProcess[str]":
    out, err = process.communicate(timeout=500)
    return subprocess.CompletedProcess([], process.wait(), out, err)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def alone(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process without Ray writes."""
    output = tmp_path_factory.mktemp("alone") / "rollouts"
    done = ended(start(tiny_llama_dir, output, seconds_per_shard=0))
    assert done.returncode == 0, done.stderr
    return files_of(output)


def test_actors_a_node_and_the_driver_are_killed_and_the_bytes_are_those_of_one_process(
    nodes: ThreeNodes, tiny_llama_dir: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    output, chance = tmp_path / "rollouts", random.Random(0)
    pool = ("--ray", nodes.address, "--workers", "3")

    def num_done() -> int:
        return len(list(output.glob("shard-*.jsonl")))

    driver = start(tiny_llama_dir, output, *pool, seconds_per_shard=1.5)
    try:
        wait_until(lambda: num_done() >= 2, "two shards")
        second = start(tiny_llama_dir, output, *pool)
        for _ in range(3):
            kill(chance.choice(nodes.actors()))
            time.sleep(0.7)
        nodes.remove_a_node()
        before = num_done()
        wait_until(lambda: num_done() >= before + 2, "shards after kills")
        refused = ended(second)
        assert refused.returncode == 2 and "is in use by process" in refused.stderr.splitlines()[-1]
    finally:
        kill(driver.pid)
    _, words = driver.communicate()
    assert num_done() < NUM_SHARDS and "died" in words
    wait_until(lambda: not nodes.actors(), "the end of the dead driver's actors")

    driver = start(tiny_llama_dir, output, "--ray", nodes.address, seconds_per_shard=0.2)
    progress = wait_until(lambda: driver.poll() is not None or read_progress(output), "progress")
    kill(wait_until(nodes.actors, "actors")[0])
    done = ended(driver)
    assert done.returncode == 0, done.stderr
    assert progress is True or (progress.total, progress.unit) == (2 * NUM_SHARDS, "prompts")
    assert files_of(output) == alone
    assert read_progress(output) is None


def test_a_shard_that_three_actors_die_at_ends_the_stage_and_is_named(
    nodes: ThreeNodes, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    done = ended(
        start(tiny_llama_dir, tmp_path / "rollouts", "--ray", nodes.address, "--workers", "2", "--seed", "666")
    )
    assert done.returncode == 2, done.stderr
    assert "error: shard-00003.jsonl: 3 workers have died at it" in done.stderr.splitlines()[-1]
    assert "bad shard" in "".join(log.read_text() for log in tmp_path.glob("rollouts.logs/worker-*.log"))


@pytest.mark.counts("hangs")
def test_an_actor_that_is_frozen_is_named_and_replaced_and_the_bytes_are_those_of_one_process(
    nodes: ThreeNodes, tiny_llama_dir: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    """SIGSTOP: no thread of it runs, its connections stay, and Ray takes it for alive."""
    output = tmp_path / "rollouts"
    pool = ("--ray", nodes.address, "--workers", "2", "--worker-timeout", "10")
    driver = start(tiny_llama_dir, output, *pool)
    wait_until(lambda: len(list(output.glob("shard-*.jsonl"))) >= 2, "two shards")
    frozen = nodes.actors()[0]
    os.kill(frozen, signal.SIGSTOP)
    try:
        done = ended(driver)
    finally:
        kill(frozen)
    assert done.returncode == 0, done.stderr
    assert re.search(r"worker \d died \(it has not answered for \d+ s \(--worker-timeout\)\): \d tasks", done.stderr)
    assert files_of(output) == alone


def test_what_cannot_be_had_is_one_line(nodes: ThreeNodes, tiny_llama_dir: Path, tmp_path: Path) -> None:
    dead = f"127.0.0.1:{free_ports(1)[0]}"
    for number, (flags, words) in enumerate(
        (
            (("--ray", dead), "nobody answers at 127.0.0.1:"),
            (("--temperature", "0.125", "--ray", nodes.address), "no such engine"),
        )
    ):
        done = ended(start(tiny_llama_dir, tmp_path / str(number), *flags))
        assert done.returncode == 2, done.stderr
        assert words in done.stderr.splitlines()[-1], done.stderr
        assert not list(tmp_path.glob("*/shard-*"))
