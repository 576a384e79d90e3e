"""Loads a sharded state from a checkpoint: each rank reads its share, and checks every item as it reads it.

What data-parallel ranks hold alike is read by one of them and handed round by Megatron-Core's wrapper; a damaged item
is refused on all ranks together, before anything is made of the state.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_sppo.checkpoints import distcp, megatron_checkpoint
from megatron_sppo.checkpoints.items import Items
from megatron_sppo.checkpoints.torch_streams import object_in
from megatron_sppo.command_line import launch
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.training import parallel

_MISFITS = (dist_checkpointing.core.CheckpointingException, KeyError, ValueError)
"""What mcore raises where keys or shapes differ; torch wraps it in a CheckpointException of all ranks' failures."""
_FAILURES = (*_MISFITS, OSError, CheckpointException)
_REFUSALS = (ConfigError, ConversionError, DataError, OSError)


class Checkpoint:
    """One `iter_*` directory that ranks load from together."""

    def __init__(self, directory: Path) -> None:
        """Read what describes the directory.

        Raises:
            ConversionError, DataError: `.metadata` or the manifest is damaged.
        """
        self._directory = Path(directory)
        self._reader = _Reader(self._directory)

    @property
    def keys(self) -> set[str]:
        """Name the tensors and objects that the checkpoint holds."""
        return set(self._reader.metadata.state_dict_metadata)

    def load(self, state: dict[str, Any], *, weights_only: bool, is_verified: bool = False) -> dict[str, Any]:
        """Load what `state` describes -> state with values in place of descriptions. Collective over all ranks.

        Args:
            weights_only: `state` describes model weights alone.
            is_verified: files without digests of their items have been hashed already.

        Raises:
            ConfigError: the checkpoint holds another model.
            DataError: an item is not what was written. Every rank raises it.
        """
        if not is_verified:
            self._check_files_without_digests(weights_only=weights_only)
        strategy = FullyParallelLoadStrategyWrapper(_Strategy(self._reader), parallel.replicas())
        with self._reader.in_place_of_mcores():
            try:
                return dist_checkpointing.load(state, str(self._directory), strategy)  # type: ignore[no-any-return]
            except _FAILURES as error:
                raise worded(error, self._directory) from error

    def _check_files_without_digests(self, *, weights_only: bool) -> None:
        """Hash the files whose items have no digests, each on one rank."""
        names = distcp.data_files(self._reader.metadata, weights_only=weights_only)
        unknown = self._reader.items.without_digests(names)
        if not unknown:
            return
        place = launch()
        largest_first = sorted(unknown, key=lambda name: (-self._directory.joinpath(name).stat().st_size, name))
        with parallel.failing_together(*_REFUSALS):
            if mine := largest_first[place.rank :: place.world_size]:
                megatron_checkpoint.verify_checkpoint(self._directory, names=mine)


class _Strategy(torch_strategy.TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Megatron-Core's strategy; what goes wrong on one rank is raised on all.

    0.19.2 reads without a word to the other ranks, which would wait for a rank that failed.
    """

    def __init__(self, reader: "_Reader") -> None:
        super().__init__()
        self._reader = reader

    def load(self, *arguments: Any, **settings: Any) -> Any:
        with parallel.failing_together(*_REFUSALS):
            try:
                return super().load(*arguments, **settings)
            except _FAILURES as error:
                raise worded(error, Path(self._reader.path)) from error


def worded(error: BaseException, checkpoint: Path) -> Exception:
    """Find the exception for people in what a load raised -> one of `_REFUSALS`.

    Raises:
        BaseException: `error` itself, where it is none.
    """
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if isinstance(cause, _REFUSALS):
            return cause
    if not all(isinstance(cause, _MISFITS) for cause in causes):
        raise error
    reason = " ".join(str(causes[0]).split())[:300]
    return ConfigError(f"{checkpoint} does not hold this model: {reason}. Import the model again.")


class _Reader(FileSystemReader):
    """torch's reader of a directory, which reads every item once, checks it, and serves all that is asked of it.

    torch's own (2.13, filesystem.py) reads an item again for each part of it, and trusts the pickle of `.metadata`.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.items = Items(directory)
        self.metadata = distcp.read_metadata(directory)

    def read_metadata(self, *_: Any, **__: Any) -> Any:
        """Return what was read once."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and check the items of a plan, in the order of their files, and give them to the planner.

        Raises:
            DataError: an item is not what was written.
        """
        wanted: dict[str, dict[tuple[int, int], list[ReadItem]]] = {}
        for request in plan.items:
            place = self.storage_data[request.storage_index]
            in_file = wanted.setdefault(place.relative_path, {})
            in_file.setdefault((place.offset, place.length), []).append(request)
        for name, in_file in sorted(wanted.items()):
            ranges = sorted(in_file)
            for item, raw in zip(ranges, self.items.read(name, ranges), strict=True):
                self._serve(in_file[item], raw, planner, name)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _serve(self, requests: list[ReadItem], raw: bytearray, planner: LoadPlanner, name: str) -> None:
        """Give an item, or parts of its tensor, to whoever asked for it."""
        held = self._load(raw, requests[0], name)
        for request in requests:
            if request.type == LoadItemType.BYTE_IO:
                planner.load_bytes(request, io.BytesIO(raw))  # which trusts its pickle: it has just been loaded as data
                continue
            target = planner.resolve_tensor(request).detach()
            box = tuple(slice(a, a + n) for a, n in zip(request.storage_offsets, request.lengths, strict=True))
            part = held[box] if isinstance(held, torch.Tensor) and held.dim() == len(box) else None
            if part is None or part.shape != target.shape:
                raise DataError(
                    f"{self.path}: {request.storage_index.fqn} in {name} is not of the shape that .metadata says. Use "
                    "another checkpoint."
                )
            target.copy_(part)
            planner.commit_tensor(request, target)

    def _load(self, raw: bytearray, request: ReadItem, name: str) -> Any:
        try:
            return object_in(raw)
        except distcp.LOADING_ERRORS as error:
            raise DataError(
                f"{self.path}: {request.storage_index.fqn} in {name} is damaged or holds more than data "
                f"({type(error).__name__}). Use another checkpoint."
            ) from None

    @contextlib.contextmanager
    def in_place_of_mcores(self) -> Iterator[None]:
        """Let Megatron-Core read by this reader (strategies/torch.py; 0.19.2 in serialization.py too)."""
        name = "_get_filesystem_reader"
        modules: list[Any] = [module for module in (torch_strategy, serialization) if hasattr(module, name)]
        saved = [getattr(module, name) for module in modules]
        try:
            for module in modules:
                setattr(module, name, lambda *_, **__: self)
            yield
        finally:
            for module, original in zip(modules, saved, strict=True):
                setattr(module, name, original)
