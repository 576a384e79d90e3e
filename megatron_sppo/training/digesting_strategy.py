"""Megatron-Core's save strategy, writing as training wants it: each byte looked at once, weights and optimizer apart.

    __RANK_N.distcp             weights and the small rest, by this rank's N-th writer
    optimizer__RANK_N.distcp    optimizer state
    NAME.digests                beside each: sha256 of its items and of the whole (`checkpoints.digests`)

Planning, metadata and the request that is run now or by a forked process are Megatron-Core's (0.16.1 and 0.19.2,
dist_checkpointing/strategies/torch.py and filesystem_async.py, whose two versions of the writing differ). The files
are plain torch_dist files to every reader.
"""

import contextlib
import functools
import itertools
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, _disable_gc
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _item_size,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sppo.checkpoints.digests import DigestingStream, ItemDigests
from megatron_sppo.errors import DataError

OPTIMIZER_PREFIX = "optimizer"
"""Of the names of the files that hold optimizer state and nothing else."""
_OPTIMIZER_KEY = re.compile(r"(chained_\d+\.)?optimizer\.")
_FILE_BYTES = 1 << 30
"""A writer's file has about so much, so that a large state is written by several at a time."""
_MOST_WRITERS = 8

_Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""Path and name of a file, and what goes into it: (items with bytes, items with tensors). As Megatron-Core's."""


class DigestingStrategy(TorchDistSaveShardedStrategy):
    """Saves `torch_dist` directories as the module says."""

    def __init__(self, failures: list[OSError]) -> None:
        """Take a list for what befalls rank 0 alone, with the metadata: the others wait for it meanwhile."""
        super().__init__("torch_dist", 1)
        self._failures = failures

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        """Write all that is this rank's to write, and wait for all ranks. Collective."""
        self.async_save(sharded_state_dict, checkpoint_dir).execute_sync()

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "mcore") -> AsyncRequest:
        """Plan a save -> what remains to be done: the writing, then the metadata, which is collective."""
        assert async_strategy == "mcore"
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = _Writer(checkpoint_dir, self._failures)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        plan = mcore_to_pyt_state_dict(by_key, False)
        (planned, *_) = save_state_dict_async_plan(plan, writer, None, coordinator_rank=0, planner=planner)
        function, stage, arguments = writer.get_save_function_and_args()
        finalize = functools.partial(save_state_dict_async_finalize, *planned)
        return AsyncRequest(function, arguments, [finalize], preload_fn=stage)


class _Writer(FileSystemWriterAsync):
    """One rank's part of one save."""

    write_buckets: list[_Bucket]

    def __init__(self, directory: Path, failures: list[OSError]) -> None:
        super().__init__(str(directory))
        self._staged: list[_Bucket] = []
        self._failures = failures

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`, on rank 0; an error is noted, for the other ranks wait in a collective."""
        try:
            super().finish(metadata, results)
        except OSError as error:
            self._failures.append(error)

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Divide the rank's items among files; nothing is copied that need not be."""
        numbers = itertools.count()
        kinds: dict[str, list[Any]] = {"": [], OPTIMIZER_PREFIX: []}
        for item in plan.items:
            kinds[OPTIMIZER_PREFIX if _OPTIMIZER_KEY.match(item.index.fqn) else ""].append(item)
        self.write_buckets = []
        for prefix, items in kinds.items():
            for bucket in _split(items):
                name = f"{prefix}{plan.storage_data.prefix}{next(numbers)}.distcp"
                content: tuple[list[Any], list[Any]] = ([], [])
                for item in bucket:
                    value = planner.resolve_data(item)
                    if item.type == WriteItemType.BYTE_IO:
                        content[0].append((item, value))
                    else:
                        content[1].append((item, _private(value.detach())))
                self.write_buckets.append((os.path.join(self.checkpoint_dir, name), name, content))
        self.results_queue = _Results(Path(self.checkpoint_dir)) if self.write_buckets else None

    def get_save_function_and_args(self) -> tuple[Any, Any, list[Any]]:
        """Say what a process has to do -> (function, what stages tensors on the CPU first, arguments), as its parent's.

        Where this rank has nothing to write the function is None.
        """
        if not self.write_buckets:
            return None, None, []
        return _write_all, self._stage, [torch.distributed.get_rank(), self.write_buckets, self.results_queue]

    def _stage(self) -> list[_Bucket]:
        """Copy what lies on a GPU to the CPU -> buckets.

        They are kept until all is written: a forked writer may share page-locked memory with this process, which would
        use it again for something else (megatron-core 0.16.1 lets go of it).
        """
        self._staged = self.preload_tensors(self.write_buckets)
        return self._staged

    def retrieve_write_results(self) -> Any:
        """Return what this rank wrote where, or the exception that ended it, wrapped as Megatron-Core gathers them."""
        self._staged = []
        answer = [] if self.results_queue is None else self.results_queue.get()
        return _wrap_exception(answer) if isinstance(answer, BaseException) else answer


def _split(items: Sequence[Any]) -> list[list[Any]]:
    """Divide items among as many files as their bytes want -> lists, none of them empty."""
    size = sum(_item_size(item) for item in items if item.type != WriteItemType.BYTE_IO)
    bins = min(_MOST_WRITERS, max(1, -(-size // _FILE_BYTES)))
    return [bucket for bucket in _split_by_size_and_type(bins, list(items)) if bucket]


def _private(tensor: Tensor) -> Tensor:
    """Give a tensor a storage that holds it alone, which is what torch.save writes; on the CPU without a copy.

    What other processes could change under a forked writer's hands (shared memory) is copied.
    """
    if tensor.device.type != "cpu":
        return tensor  # staged later, alone
    if tensor.is_shared() or not tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    alone = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return alone.view(tensor.dtype).view(tensor.shape)


class _Results:
    """Carries one answer from a forked process, or from this one, in memory that both see and that holds any size.

    Megatron-Core starts a manager process for it, which imports the program again.
    """

    def __init__(self, directory: Path) -> None:
        self._file = open(os.memfd_create("checkpoint-results"), "r+b")
        self._directory = directory

    def put(self, answer: Any) -> None:
        """Leave the answer."""
        pickle.dump(answer, self._file)
        self._file.flush()

    def get(self) -> Any:
        """Take the answer; an exception where its writer died before it gave one."""
        self._file.seek(0)
        with contextlib.closing(self._file), contextlib.suppress(EOFError, pickle.UnpicklingError):
            return pickle.load(self._file)  # noqa: S301  (what our own process has put there)
        return DataError(
            f"{self._directory} was not finished: the process that wrote it died (out of memory?). "
            "Run the same command again: it goes on from the last checkpoint."
        )


def _write_all(_rank: int, buckets: Sequence[_Bucket], results: _Results) -> None:
    """Write this rank's files side by side, and leave the results, or the exception for the training process."""
    # Collecting a tensor of its parent's GPU would end a forked process.
    with _disable_gc(), _without_checksums(), ThreadPoolExecutor(max_workers=_num_threads(len(buckets))) as pool:
        futures = [pool.submit(_write_file, bucket) for bucket in buckets]
    failures = [failure for future in futures if (failure := future.exception())]
    results.put(failures[0] if failures else [result for future in futures for result in future.result()])


def _num_threads(num_files: int) -> int:
    """Share this machine's cores among its ranks -> the threads of this one."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(num_files, len(os.sched_getaffinity(0)) // local_ranks))


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Let torch.save leave out the zip format's CRC32, a further pass over memory that torch.load does not look at."""
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(checksums)


def _write_file(bucket: _Bucket) -> list[WriteResult]:
    """Write one file and its digests, down to the disk -> where each item lies in it."""
    path, name, (objects, tensors) = bucket
    digests, written = ItemDigests(), []
    with open(path, "wb") as file:
        for item, value in [*objects, *tensors]:
            offset = digests.position
            with DigestingStream(file, digests) as stream:
                if isinstance(value, Tensor):
                    _save_tensor(value, stream)
                else:
                    stream.write(value.getbuffer())
            length = digests.position - offset
            place = _StorageInfo(name, offset, length)
            written.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
        file.flush()
        os.fsync(file.fileno())
    digests.write(Path(path))
    return written


def _save_tensor(tensor: Tensor, stream: DigestingStream) -> None:
    try:
        torch.save(tensor, cast(IO[bytes], stream))
    except RuntimeError as error:
        # Where the disk says ENOSPC, torch's zip writer says "unexpected pos" (inline_container.cc).
        raise stream.failure or error from error
