"""Sharded states saved outside of a run: as a run does, or by Megatron-Core's own writer, as earlier versions did."""

import importlib
import inspect
import queue
from pathlib import Path
from typing import Any


def save_as_a_run(state: dict[str, Any], directory: Path) -> None:
    """Write a sharded state into an empty directory, and wait for it. Collective."""
    from megatron_sppo.training import saving

    saving._plan(state, directory).execute_sync()


def save_by_megatron_core(state: dict[str, Any], directory: Path, **settings: Any) -> Any:
    """Write it by Megatron-Core's default strategy -> what its `save` returns. Collective.

    A synchronous save of it starts a multiprocessing Manager that imports `__main__` again; a plain queue does.
    """
    from megatron.core import dist_checkpointing

    strategies = "megatron.core.dist_checkpointing.strategies"
    for module in (importlib.import_module(f"{strategies}.{name}") for name in ("filesystem_async", "torch")):
        for name in ("_get_write_results_queue", "get_write_results_queue"):
            if hasattr(module, name):
                setattr(module, name, lambda *_, **__: queue.Queue())
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        settings["async_strategy"] = "mcore"  # 0.19.2's default needs a package that 0.16.1 does not know of
    return dist_checkpointing.save(state, str(directory), **settings)
