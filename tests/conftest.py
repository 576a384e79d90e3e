"""What every test stands on: one thread a process, no hub, and the models that more than one test needs."""

import fcntl
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports torch or transformers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

from tests.imports import imports_megatron
from tests.settled import settle

pytest_plugins = ["tests.reliability.tally"]

# Collections of garbage cost a fifth of all the imports; pytest_collection_finish begins with them.
gc.disable()

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _package_for_child_processes() -> Iterator[None]:
    """Let tools that tests start as processes import this checkout, installed or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        yield


_LOGGERS = [logging.getLogger(name) for name in (None, "megatron_sppo", "__main__")]
_LEVELS = [logger.level for logger in _LOGGERS]


@pytest.fixture(autouse=True)
def _levels_of_logging() -> Iterator[None]:
    """Put levels back: commands that tests run in this process set them, as do peers on import."""
    _put_levels_back()
    yield
    _put_levels_back()


def _put_levels_back() -> None:
    for logger, level in zip(_LOGGERS, _LEVELS, strict=True):
        if logger.level != level:  # to set one costs all loggers their caches
            logger.setLevel(level)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory: built once per checkout, by whoever comes first. Read only."""
    directory = REPOSITORY / ".cache" / "smollm2"
    directory.parent.mkdir(exist_ok=True)
    with open(directory.parent / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, str(REPOSITORY / "examples/build_smollm2.py"), "--output", str(directory)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return directory


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and a byte tokenizer. Read only."""
    from tests.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny_llama")


LONGEST_FIRST = (
    "test_cluster_rollouts_vllm",
    "test_cluster_scoring",
    "test_pretrain",
    "test_family_logits",
    "test_family_gradients",
    "test_plan_memory",
    "test_adapter_training",
    "test_async_saves",
    "test_moe_pretrain",
    "test_cluster_rollouts",
    "test_self_play_vllm",
    "test_moe_layouts",
    "test_optimizer_shards",
    "test_layouts",
    "test_mixture_families",
    "test_self_play",
    "test_gpu_benchmarks",
    "test_self_play_adapters",
    "test_self_play_bytes",
    "test_wheel",
    "test_pretrain_signals",
    "test_adapter_layouts",
    "test_packing_layouts",
    "test_convert",
    "test_other_references",
    "test_docs_vllm",
    "test_families_vllm",
    "test_self_play_servers",
    "test_alignment_benchmark",
)
"""Modules that take long, so that two workers end together; those that start vLLM one at a time are not neighbours."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-layouts", action="store_true", help="run the tests marked all_layouts too")
    parser.addoption("--first-cases", action="store_true", help="of each test in tests/distributed, run the first case")


def _keep(config: pytest.Config, items: list[pytest.Item], is_kept: Callable[[pytest.Item], bool]) -> None:
    left_out = [item for item in items if not is_kept(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_kept(item)]


def _is_distributed(item: pytest.Item) -> bool:
    return item.path.parent.name == "distributed"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by the mark
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what stands on Megatron-Core, leave out what flags leave for other runs, skip `gpu` where there is none.

    Long modules come first, in which order xdist deals them out (--no-loadscope-reorder).
    """
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if imports_megatron(item.path):
            item.add_marker(pytest.mark.megatron)
    if not config.getoption("--all-layouts"):
        _keep(config, items, lambda item: not item.get_closest_marker("all_layouts"))
    if config.getoption("--first-cases"):
        first = set({item.nodeid.partition("[")[0]: item for item in reversed(items)}.values())
        _keep(config, items, lambda item: not _is_distributed(item) or item in first)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what modules have imported out of collections: where a test asks for one, it took half a second each."""
    settle(for_forks=len(session.items) > 100)
    # A process that a test forks has no threads of its parent's: what is garbage here and ends by them (a process group
    # of gloo's) would end it.
    os.register_at_fork(after_in_child=gc.freeze)
