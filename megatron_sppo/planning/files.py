"""What an iteration of self-play reads, hashes and writes of a model, how long it waits for that; the disk of a run.

W = bytes of the weights, C = bytes of a checkpoint (weights and optimizer state), b = a rank's part of either,
h, r, w = what one thread hashes, reads and writes in a second, n = nodes. Where a byte goes is the stages' business
(training/saving.py, training/verified_load.py, conversion/convert.py, selfplay/fingerprint.py); what a second is worth
is `MachineConfig`'s. Rollouts, datasets and results are left out: 1.5 GB at 60,000 prompts.
"""

from dataclasses import dataclass

from megatron_sppo.architecture import Architecture
from megatron_sppo.planning.config import MachineConfig, PlanConfig
from megatron_sppo.planning.parameters import Grid, num_trained, rank_elements
from megatron_sppo.weight_counts import num_parameters

_GIGA = 1e9
_FLOAT32 = 4
_SAVE_HASHES = 2
"""A byte that is saved goes into the sha256 of its tensor and into that of its file (checkpoints/digests.py)."""
_FILE_BYTES, _MOST_WRITERS = 1 << 30, 8
"""A rank writes as many files side by side as there are these bytes in its part, at most so many (training)."""
_CONVERTER_THREADS = 16
"""Of an export, and of who hashes files that no manifest lists, at most (checkpoints/file_digests.py)."""
_LOADS = 3
"""Of weights: training's, and the policy and its predecessor of `inspect`."""
_ENGINE_STARTS = 2
"""For the training prompts and for the held-out ones."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One way that bytes take, as often as an iteration takes it; bytes are of all processes together."""

    what: str
    num_times: int
    read_bytes: float
    hashed_bytes: float
    written_bytes: float
    waited_seconds: float
    """That the iteration is longer for it."""
    hidden_seconds: float = 0.0
    """Of the same work, behind steps."""


@dataclass(frozen=True, kw_only=True)
class FileTraffic:
    """The files of one iteration, and those of a run."""

    weights_bytes: int
    checkpoint_bytes: int
    """Weights and optimizer state: 14 bytes a weight for Adam in bfloat16 (2 + 4 + 8)."""
    rank_bytes: float
    """Of a checkpoint, what the busiest rank writes."""
    passages: tuple[Passage, ...]
    peak_disk_bytes: int
    """Most that the run directory holds of models at one time."""

    @property
    def waited_seconds(self) -> dict[str, float]:
        """Seconds of an iteration -> {what: seconds}."""
        return {passage.what: passage.waited_seconds for passage in self.passages}


def file_traffic(
    architecture: Architecture, config: PlanConfig, grid: Grid, *, num_steps: int, step_seconds: float
) -> FileTraffic:
    """Count an iteration's traffic with the file system, and a run's disk -> FileTraffic."""
    narrow = config.model.type_bytes
    moments = 1 if config.optimization.optimizer == "rmsprop" else 2
    state = (moments + (narrow < _FLOAT32)) * _FLOAT32
    trained, busiest = num_trained(architecture, grid.adapters), rank_elements(architecture, grid, trained=True)
    # With adapters the base is read, and adapters alone are written, exported and given to the engines beside it.
    weights, exported, checkpoint = num_parameters(architecture) * narrow, trained * narrow, trained * (narrow + state)
    interval = config.run.save_interval or num_steps
    saves = -(-num_steps // interval)
    disks = _Disks(config.machine, grid.world_size)
    return FileTraffic(
        weights_bytes=weights,
        checkpoint_bytes=checkpoint,
        rank_bytes=busiest * (narrow + state),
        passages=(
            _saving(
                disks,
                checkpoint,
                busiest * (narrow + state),
                saves=saves,
                between=interval * step_seconds,
                in_background=config.run.async_save,
            ),
            _loading(disks, weights, rank_elements(architecture, grid) * narrow),
            _export(disks, exported),
            _hashing(disks, exported),
            _hand_over(disks, weights),
        ),
        peak_disk_bytes=peak_disk_bytes(
            weights,
            checkpoint,
            saves=saves,
            keep_last=config.run.keep_last,
            iterations=config.workload.num_iterations,
            keep_iterations=config.workload.keep_iterations,
            exported=exported,
        ),
    )


def peak_disk_bytes(
    weights: int,
    checkpoint: int,
    *,
    saves: int,
    keep_last: int | None,
    iterations: int,
    keep_iterations: int | None,
    exported: int | None = None,
) -> int:
    """Add up a run directory when it is fullest: in its last iteration -> bytes.

    The start model as a checkpoint without optimizer, W; of each finished iteration that is kept, its checkpoints and
    its export; of the one under way one checkpoint more than it keeps (a new one is published before an old one goes),
    or what it keeps and the export. `keep_iterations` older ones are there beside the one under way.

    Args:
        saves: of an iteration.
        keep_last: training's, checkpoints of an iteration; None: all.
        keep_iterations: self-play's; None: all.
        exported: of an iteration; None: the weights.
    """
    exported = weights if exported is None else exported
    kept = min(saves, keep_last or saves)
    finished = kept * checkpoint + exported
    under_way = max(min(saves, kept + 1) * checkpoint, finished)
    older = min(iterations - 1, keep_iterations or iterations)
    return weights + older * finished + under_way


@dataclass(frozen=True, kw_only=True)
class _Move:
    """Bytes that processes move at the same time, each its own."""

    num_bytes: float
    """Of all."""
    process_bytes: float
    """Of the busiest."""
    threads: int


class _Disks:
    """What a world of ranks does with files in a second."""

    def __init__(self, machine: MachineConfig, world_size: int) -> None:
        self.machine = machine
        self.nodes = -(-world_size // machine.gpus_per_node)
        self.rank_cores = max(1, machine.cores_per_node // min(world_size, machine.gpus_per_node))

    def seconds(self, move: _Move, *, nodes: int, hashes: int = 0, reads: bool = False, writes: bool = False) -> float:
        """Time it: hashing, and then the narrowest of threads, nodes and file system -> seconds.

        b hashes / (threads h) + max(b (1/r + 1/w) / threads, total / (nodes storage), total / file system), where what
        is not read or not written falls away. A thread hashes a block and then writes it, so that the two add up.
        """
        machine = self.machine
        passes = reads + writes
        each = reads / machine.thread_read_gb_per_s + writes / machine.thread_write_gb_per_s
        shared = min(nodes * machine.storage_gb_per_s, machine.file_system_gb_per_s)
        moving = max(move.process_bytes * each / move.threads, passes * move.num_bytes / shared)
        return (move.process_bytes * hashes / move.threads / machine.hash_gb_per_s + moving) / _GIGA


def _saving(
    disks: _Disks, checkpoint: int, rank_bytes: float, *, saves: int, between: float, in_background: bool
) -> Passage:
    """Time the saves: every rank writes its own part -> Passage.

    A save that is waited for: copy + write. One in the background: copy, and what is left of writing the one before
    when it is due; the last is waited for whole, since the run ends with it (training/saving.py).

    Args:
        between: seconds of the steps between two saves.
    """
    threads = min(_MOST_WRITERS, max(1, -(-round(rank_bytes) // _FILE_BYTES)), disks.rank_cores)
    move = _Move(num_bytes=checkpoint, process_bytes=rank_bytes, threads=threads)
    copy = rank_bytes / disks.machine.device_copy_gb_per_s / _GIGA
    write = disks.seconds(move, nodes=disks.nodes, hashes=_SAVE_HASHES, writes=True)
    waited = saves * (copy + write)
    hidden = (saves - 1) * min(write, between) if in_background else 0.0
    return Passage(
        what="saving checkpoints",
        num_times=saves,
        read_bytes=0,
        hashed_bytes=saves * _SAVE_HASHES * checkpoint,
        written_bytes=saves * checkpoint,
        waited_seconds=waited - hidden,
        hidden_seconds=hidden,
    )


def _loading(disks: _Disks, weights: int, rank_bytes: float) -> Passage:
    """Time the loads: replicas share the reading and send each other the rest; each checks what it reads -> Passage."""
    move = _Move(num_bytes=weights, process_bytes=rank_bytes, threads=1)
    return Passage(
        what="loading checkpoints",
        num_times=_LOADS,
        read_bytes=_LOADS * weights,
        hashed_bytes=_LOADS * weights,
        written_bytes=0,
        waited_seconds=_LOADS * disks.seconds(move, nodes=disks.nodes, hashes=1, reads=True),
    )


def _of_one_process(disks: _Disks, weights: int) -> _Move:
    threads = min(_CONVERTER_THREADS, disks.machine.cores_per_node)
    return _Move(num_bytes=weights, process_bytes=weights, threads=threads)


def _export(disks: _Disks, weights: int) -> Passage:
    """Time the export to Hugging Face: one process reads, checks and writes every byte once -> Passage."""
    seconds = disks.seconds(_of_one_process(disks, weights), nodes=1, hashes=1, reads=True, writes=True)
    return Passage(
        what="export",
        num_times=1,
        read_bytes=weights,
        hashed_bytes=weights,
        written_bytes=weights,
        waited_seconds=seconds,
    )


def _hashing(disks: _Disks, weights: int) -> Passage:
    """Time the loop's look at the export, which no manifest lists: read back at a disk's speed at worst -> Passage."""
    return Passage(
        what="hashing the export",
        num_times=1,
        read_bytes=weights,
        hashed_bytes=weights,
        written_bytes=0,
        waited_seconds=disks.seconds(_of_one_process(disks, weights), nodes=1, hashes=1, reads=True),
    )


def _hand_over(disks: _Disks, weights: int) -> Passage:
    """Time the engines' reading of the export: every node reads all of it once, whatever it runs -> Passage."""
    read = disks.nodes * weights
    move = _Move(num_bytes=read, process_bytes=weights, threads=min(_CONVERTER_THREADS, disks.machine.cores_per_node))
    return Passage(
        what="hand-over to the engine",
        num_times=_ENGINE_STARTS,
        read_bytes=_ENGINE_STARTS * read,
        hashed_bytes=0,
        written_bytes=0,
        waited_seconds=_ENGINE_STARTS * disks.seconds(move, nodes=disks.nodes, reads=True),
    )
