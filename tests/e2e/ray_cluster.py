"""Three Ray nodes on this machine, as Ray itself tests with, and the processes of their actors."""

import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from tests.e2e import forking_python

OBJECT_STORE_BYTES = 80 << 20
RAY_WORKER = Path(__file__).with_name("ray_worker.py")
PYTHON = """#!/bin/sh
case "$1" in
*/setup_worker.py | */default_worker.py) [ ! -e {forking} ] || exec {forking} "$@" ;;
esac
exec {python} "$@"
"""
"""What a node starts Python by: its workers are forked, which import Ray and the package in no time."""


class ThreeNodes:
    """A cluster of three nodes with one CPU each."""

    def __init__(self, python: Path, fork_workers: Callable[[], None], *, forked_by: int, num_gpus: int = 0) -> None:
        """Start them.

        Args:
            fork_workers: begins with it, where workers are started as Ray does so far.
            forked_by: pid of whose children those are that are forked.
        """
        self.fork_workers = fork_workers
        self._parents = psutil.Process(), psutil.Process(forked_by)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 is Ray's own: beside other tests a worker would starve
        from ray.cluster_utils import Cluster

        node: dict[str, Any] = {"num_cpus": 1, "num_gpus": num_gpus, "object_store_memory": OBJECT_STORE_BYTES}
        with patch.object(sys, "executable", str(python)):
            self._cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
            self._others = [self._cluster.add_node(**node) for _ in range(2)]
        self.address: str = self._cluster.address

    def actors(self) -> list[int]:
        """List the processes that hold an actor of the pool -> pids."""
        found = []
        for process in itertools.chain.from_iterable(parent.children(recursive=True) for parent in self._parents):
            try:
                if "ray::Desk" in " ".join(process.cmdline()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return sorted(set(found))

    def remove_a_node(self) -> None:
        """Kill a node with all that runs on it."""
        self._cluster.remove_node(self._others.pop(), allow_graceful=False)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def kill(pid: int) -> None:
    """Kill a process at once; it may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    """Wait for something -> what the condition gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return found


def three_nodes(*, forks: bool = True, **settings: Any) -> Iterator[ThreeNodes]:
    """Have three nodes for a fixture.

    Args:
        forks: their workers are forked; else they start as Ray starts them, until `ThreeNodes.fork_workers`.
    """
    with tempfile.TemporaryDirectory() as directory, forking_python.serving(Path(directory, "socket")) as server:
        forking, python = Path(directory, "forking"), Path(directory, "python")
        python.write_text(PYTHON.format(forking=forking, python=sys.executable))
        python.chmod(0o755)

        def fork_workers() -> None:
            new = forking.with_suffix(".new")
            forking_python.write_client(new, Path(directory, "socket"), str(RAY_WORKER))
            new.rename(forking)

        if forks:
            fork_workers()
        nodes = ThreeNodes(python, fork_workers, forked_by=server, **settings)
        try:
            yield nodes
        finally:
            nodes.close()
