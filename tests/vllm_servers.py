"""Real vLLM servers on the CPU, for tests."""

import contextlib
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from megatron_sppo.rollout.hand_over import EXTENSION
from tests.e2e.forked import Forked
from tests.ports import free_ports

SERVER = "vllm.entrypoints.openai.api_server"


@contextlib.contextmanager
def vllm_servers(model: Path, logs: Path, *flags: str, count: int = 1, **environment: str) -> Iterator[list[str]]:
    """Start servers of a model with our worker extension and vLLM's development routes -> their URLs."""
    ports = free_ports(count)
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    processes = []
    for port in ports:
        command = ["--model", model, "--served-model-name", "policy", "--host", "127.0.0.1", "--port", port]
        command += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16"]
        command += ["--worker-extension-cls", EXTENSION, *flags]
        processes.append(Forked(SERVER, command, {**variables, **environment}, stderr=logs / f"{port}.log"))
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        for url, process in zip(urls, processes, strict=True):
            _wait_for(url, process)
        yield urls
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)


def _wait_for(url: str, process: Forked) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server of {url} ended with {process.poll()}: {process.communicate()[1][-3000:]}")
