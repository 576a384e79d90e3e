"""Three Ray nodes on this machine, as Ray itself tests with, and the processes of their actors."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

OBJECT_STORE_BYTES = 80 << 20


class ThreeNodes:
    """A cluster of three nodes with one CPU each."""

    def __init__(self, *, num_gpus: int = 0) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 is Ray's own: beside other tests a worker would starve
        from ray.cluster_utils import Cluster

        node: dict[str, Any] = {"num_cpus": 1, "num_gpus": num_gpus, "object_store_memory": OBJECT_STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        self._others = [self._cluster.add_node(**node) for _ in range(2)]
        self.address: str = self._cluster.address

    def actors(self) -> list[int]:
        """List the processes that hold an actor of the pool -> pids."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if "ray::Desk" in " ".join(process.cmdline()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return sorted(found)

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


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def three_nodes(**settings: Any) -> Iterator[ThreeNodes]:
    """Have three nodes for a fixture."""
    nodes = ThreeNodes(**settings)
    try:
        yield nodes
    finally:
        nodes.close()
