"""Proves what a save costs and what it holds: each byte written, hashed and looked at once, in files by kind.

Also that a save in the background holds the moment at which it was begun, and that one which fails leaves nothing. One
rank; sharing among ranks, resuming and kills are in tests/distributed/test_async_saves.py.
"""

import errno
import hashlib
import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing

from megatron_sppo.checkpoints import digests, megatron_checkpoint
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.errors import DataError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model_file import read_architecture
from megatron_sppo.training import checkpoint, digesting_strategy, parallel
from megatron_sppo.training.config import OptimizationConfig, ParallelConfig
from megatron_sppo.training.optimizer import allocate_state, build_optimizer, build_scheduler
from megatron_sppo.training.policy import build_policy, weights_hash
from megatron_sppo.training.progress import Progress
from megatron_sppo.training.saving import Saver
from tests.file_layer import SMALL, counted
from tests.models import tiny_llama

LAYOUT = ParallelConfig(use_distributed_optimizer=True)
OPTIMIZATION = OptimizationConfig(lr=1e-3)
MODEL = ModelConfig(params_dtype="float32", transformer_impl="torch")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of some 1.3 million weights: megabytes, so that nothing small counts."""
    root = tmp_path_factory.mktemp("llama")
    import_checkpoint(tiny_llama(root / "hf", hidden_size=256, intermediate_size=512), root / "megatron")
    return root / "megatron/iter_0000000"


class Run:
    """What a run holds that is saved."""

    def __init__(self, source: Path, root: Path, *, in_background: bool) -> None:
        self.architecture, _ = read_architecture(source)
        self.policy = build_policy(self.architecture, MODEL, LAYOUT)
        checkpoint.load_weights(self.policy, source)
        self.optimizer = build_optimizer(self.policy.chunks, OPTIMIZATION, MODEL, LAYOUT)
        self.scheduler = build_scheduler(self.optimizer, OPTIMIZATION, train_iters=10)
        self.progress = Progress(step=3)
        allocate_state(self.optimizer)
        self.saver = Saver(
            root,
            self.policy,
            self.optimizer,
            self.scheduler,
            progress=self.progress,
            source=source,
            in_background=in_background,
        )

    @torch.no_grad()
    def train_on(self) -> None:
        for chunk in self.policy.chunks:
            for parameter in chunk.parameters():
                parameter.add_(1)


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield lambda *, in_background=False: Run(source, tmp_path / "save", in_background=in_background)
    parallel.shut_down()


def bytes_written() -> int:
    """Count what this process has written by system calls (proc(5), /proc/PID/io)."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["wchar"])


def test_a_save_writes_and_hashes_each_byte_once_and_reads_nothing_large(run: Callable[..., Run]) -> None:
    ours = run()
    written = bytes_written()
    with counted() as counts:
        target = ours.saver.save(wait=True)
    written = bytes_written() - written
    large = sum(path.stat().st_size for path in target.glob("*.distcp"))
    values = sum(4 * parameter.numel() for chunk in ours.policy.chunks for parameter in chunk.parameters())
    # Weights, their main copy and two moments, in float32, with some 1 KiB around each item.
    assert 4 * values <= large < 4.1 * values and values > 4e6
    assert large <= counts.hashed < large + SMALL
    assert large <= written < 1.1 * large
    assert counts.read < 0.1 * large


def test_weights_and_optimizer_lie_in_files_of_their_own_and_every_item_once(run: Callable[..., Run]) -> None:
    target = run().saver.save(wait=True)
    places = pickle.loads((target / ".metadata").read_bytes()).storage_data
    for index, place in places.items():
        assert index.fqn.startswith("optimizer.") == place.relative_path.startswith("optimizer__"), index
    for path in target.glob("*.distcp"):
        lie_here = sorted((p.offset, p.length) for p in places.values() if p.relative_path == path.name)
        found = digests.read_digests(path)
        assert [(item.offset, item.length) for item in found.items] == lie_here
        content = path.read_bytes()
        for item in found.items:
            assert item.sha256 == hashlib.sha256(content[item.offset : item.offset + item.length]).hexdigest()
        assert sum(item.length for item in found.items) == len(content)  # nothing lies between them


def test_the_manifest_has_the_sha256_of_every_file_or_of_its_digests(run: Callable[..., Run]) -> None:
    target = run().saver.save(wait=True)
    manifest = json.loads((target / "manifest.json").read_text())["files"]
    paths = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    assert manifest.keys() == paths.keys() - {"manifest.json"} and "__0_0.digests" in manifest
    for name, entry in manifest.items():
        assert entry["bytes"] == paths[name].stat().st_size
        if name.endswith(".distcp"):
            assert entry["digests"] == f"{Path(name).stem}.digests"
        assert entry["sha256"] == hashlib.sha256(paths[entry.get("digests", name)].read_bytes()).hexdigest(), name
    megatron_checkpoint.verify_checkpoint(target)


def test_the_readers_of_torch_and_of_megatron_core_open_it(run: Callable[..., Run]) -> None:
    ours = run()
    target = ours.saver.save(wait=True)
    (stage,) = ours.policy.stages
    head = stage.output_layer.weight
    for name, weight in (("output_layer.weight", head), ("optimizer.state.exp_avg.output_layer.weight", None)):
        state = {name: torch.full_like(head, 7)}
        dcp.load(state, checkpoint_id=target, no_dist=True)
        expected = torch.zeros_like(head) if weight is None else weight
        rows = ours.architecture.vocab_size
        assert torch.equal(state[name][:rows], expected[:rows])
    loaded = dist_checkpointing.load({"model": stage.sharded_state_dict()}, str(target))
    for name, value in stage.state_dict().items():
        if isinstance(value, torch.Tensor) and value.numel():
            assert torch.equal(loaded["model"][name], value), name


def test_what_is_written_in_the_background_is_what_stood_when_it_was_begun(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory shared with other processes, which a fork does not copy, included."""
    write = digesting_strategy._write_file

    def write_when_told(bucket: Any) -> Any:
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        return write(bucket)

    monkeypatch.setattr(digesting_strategy, "_write_file", write_when_told)
    ours = run(in_background=True)
    ours.policy.stages[0].output_layer.weight.data.share_memory_()
    before = weights_hash(ours.policy.stages)
    target = ours.saver.save(wait=False)
    assert ours.saver.is_writing() and not target.exists()
    ours.train_on()
    ours.progress.step = 4
    assert weights_hash(ours.policy.stages) != before and ours.saver.is_writing()
    (tmp_path / "go").touch()
    ours.saver.finish()
    assert not ours.saver.is_writing()
    assert (tmp_path / "save/latest_checkpointed_iteration.txt").read_text() == "3\n"
    checkpoint.load_weights(ours.policy, target)
    assert weights_hash(ours.policy.stages) == before
    assert dist_checkpointing.load_common_state_dict(str(target))["iteration"] == 3


def test_the_next_save_publishes_the_one_that_is_still_being_written(run: Callable[..., Run], tmp_path: Path) -> None:
    ours = run(in_background=True)
    first = ours.saver.save(wait=False)
    ours.progress.step = 4
    second = ours.saver.save(wait=True)
    for target in (first, second):
        megatron_checkpoint.verify_checkpoint(target)
    assert (tmp_path / "save/latest_checkpointed_iteration.txt").read_text() == "4\n"
    assert ours.saver.pop_seconds() > 0 and ours.saver.pop_seconds() == 0


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_is_full_is_told_in_one_line_and_leaves_the_checkpoint_before(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """The file refuses in the midst of a tensor, where torch's writer reports another error."""
    ours = run(in_background=in_background)
    good = ours.saver.save(wait=True)

    class Full:
        def __init__(self, raw: Any, told: Any) -> None:
            self.raw, self.told = raw, told

        def write(self, block: Any) -> int:
            if self.told.position > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.raw.write(block)

    stream = digesting_strategy.DigestingStream
    monkeypatch.setattr(digesting_strategy, "DigestingStream", lambda raw, told: stream(Full(raw, told), told))
    ours.progress.step = 4
    with pytest.raises(DataError, match=r"\.iter_0000004\.partial could not be written: the disk is full"):
        ours.saver.save(wait=False)
        ours.saver.finish()
    assert sorted(path.name for path in (tmp_path / "save").iterdir()) == [
        "iter_0000003",
        "latest_checkpointed_iteration.txt",
        "model.json",
    ]
    megatron_checkpoint.verify_checkpoint(good)


def test_a_writer_that_dies_is_told(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digesting_strategy, "_write_file", lambda bucket: os.kill(os.getpid(), signal.SIGKILL))
    ours = run(in_background=True)
    ours.saver.save(wait=False)
    with pytest.raises(DataError, match=r"was not finished: the process that wrote it died .*the last checkpoint\."):
        ours.saver.finish()


def test_what_a_killed_run_left_half_written_goes_with_the_next_save(run: Callable[..., Run], tmp_path: Path) -> None:
    left = tmp_path / "save/.iter_0000002.partial"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_text("half")
    run().saver.save(wait=True)
    assert not left.exists()


def test_a_view_is_saved_without_a_copy_of_its_memory_and_without_its_neighbours() -> None:
    buffer = torch.arange(24, dtype=torch.bfloat16)
    view = buffer[8:20].view(3, 4)
    alone = digesting_strategy._private(view)
    assert torch.equal(alone, view) and alone.data_ptr() == view.data_ptr()
    assert alone.untyped_storage().nbytes() == 24 and alone.dtype == torch.bfloat16
    assert digesting_strategy._private(buffer[:0]).untyped_storage().nbytes() == 0
    shared = torch.ones(3).share_memory_()
    assert digesting_strategy._private(shared).data_ptr() != shared.data_ptr()


def test_a_large_state_is_divided_among_several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six items of 8 MiB in files of 16 MiB: three files of two."""
    monkeypatch.setattr(digesting_strategy, "_FILE_BYTES", 16 << 20)
    state = {f"w{index}": torch.empty(2 << 20) for index in range(6)}
    items = [item for name, value in state.items() for item in dcp.planner_helpers._create_write_items(name, value)]
    assert [len(bucket) for bucket in digesting_strategy._split(items)] == [2, 2, 2]
    assert digesting_strategy._split([]) == []
