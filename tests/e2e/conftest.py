"""vLLM holds some GiB: of the modules that start it (`*_vllm`) one runs at a time, whatever xdist has under way."""

import fcntl
import os
from collections.abc import Iterator

import pytest

from tests.e2e import forked

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, which an engine fills with zeros


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist's workers fork commands from one process, which imports while they collect."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        forked.share_server()


@pytest.fixture(scope="module", autouse=True)
def _one_vllm_at_a_time(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not request.path.stem.endswith("_vllm"):
        yield
        return
    # The parent of a worker's directory is the run's.
    with open(tmp_path_factory.getbasetemp().parent / "vllm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
