"""What `benchmarks.scale` measured, as rows: each of fifteen faults as it was and is, then every stage."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.instruments import COUNTS
from benchmarks.record import Row
from benchmarks.scale_counts import HIDDEN_SIZES, LINEAR, counted_sizes, growth

Measured = Mapping[str, Mapping[str, Mapping[str, float]]]
"""{stage: {size, or "counts SIZE": {figure: value}}}"""
BEFORE = "commit 87e42d6"
MIB = 2**20
_WORDS = {"train": "train --help", "plan": "plan of 512 ranks", "report": "report of 16 prompts"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One of the faults that were found, and what says that it is gone."""

    id: str
    metric: str
    figure: Callable[[Measured], float]
    most: float | None = None
    """Target: at most this."""
    share: float | None = None
    """Target: at most this times what it was."""
    least: float | None = None
    """Target: at least this."""


def _of(measured: Measured, stage: str, name: str, size: int | None = None) -> float:
    """Look a figure up, at the largest model where no size is given."""
    return measured[stage][str(size or HIDDEN_SIZES[-1])][name]


def _share(stage: str, name: str, of: str, *, less: tuple[tuple[str, float], ...] = ()) -> Callable[[Measured], float]:
    """Divide a figure, less multiples of others, by another of the same stage -> what does so."""

    def figure(measured: Measured) -> float:
        taken = sum(times * _of(measured, stage, other) for other, times in less)
        return (_of(measured, stage, name) - taken) / _of(measured, stage, of)

    return figure


def _per(stage: str, name: str, size: int, scale: float, measured: Measured) -> float:
    return scale * _of(measured, stage, name, size) / size


def _grown(stage: str, name: str, large: int, small: int, measured: Measured) -> float:
    """Divide a figure by the size at two sizes -> how many times as much it is at the larger."""
    return _of(measured, stage, name, large) / _of(measured, stage, name, small) * small / large


def _slope(stage: str, name: str, large: int, small: int, scale: float, measured: Measured) -> float:
    return scale * (_of(measured, stage, name, large) - _of(measured, stage, name, small)) / (large - small)


def _rank_1_writes(measured: Measured) -> float:
    written = [_of(measured, "save by two ranks", f"bytes_written_of_rank_{rank}") for rank in range(2)]
    return written[1] / sum(written)


def faults(largest: int) -> tuple[Fault, ...]:
    """List them, prompts being as many as were measured at the most."""
    first_save, resumed = "training and a save", "resuming and a save"
    return (
        Fault(
            id="F1",
            metric="bytes that the thread which waits for a save hashes beside weights it loads, of the checkpoint's",
            figure=_share(first_save, "bytes_hashed_waiting", "checkpoint_bytes", less=(("weights_bytes", 1),)),
            most=0.02,
        ),
        Fault(
            id="F1",
            metric="bytes read in training from an import and a save beside the weights once, of the checkpoint's",
            figure=_share(first_save, "bytes_read", "checkpoint_bytes", less=(("weights_bytes", 1),)),
            most=0.05,
        ),
        Fault(
            id="F1",
            metric="seconds that a step waits for a save of 200 MB",
            figure=partial(_of, stage=first_save, name="seconds_waited"),
        ),
        Fault(
            id="F1",
            metric="seconds that a step waits for a save of 200 MB in the background (before: no such save)",
            figure=partial(_of, stage="save in the background", name="seconds_waited"),
        ),
        Fault(id="F2", metric="share of a save that the second of two ranks writes", figure=_rank_1_writes, least=0.4),
        Fault(
            id="F2",
            metric="memory of the second rank over a save, of the checkpoint's bytes",
            figure=_share("save by two ranks", "peak_bytes_of_rank_1", "checkpoint_bytes"),
        ),
        Fault(
            id="F2",
            metric="bytes that the second of two ranks reads to resume, of the checkpoint's",
            figure=_share("resuming by two ranks", "bytes_read_of_rank_1", "checkpoint_bytes"),
        ),
        Fault(
            id="F3",
            metric="elements of the index that planning a step goes through, 60,000 prompts by 2,000",
            figure=lambda measured: (
                _of(measured, "planning a step", "elements_a_step", 60_000)
                / _of(measured, "planning a step", "elements_a_step", 2_000)
            ),
            most=LINEAR,
        ),
        Fault(
            id="F3",
            metric="CPU ms to plan and collate a step of 1,024 responses, 64 ranks, 60,000 prompts",
            figure=lambda measured: 1000 * _of(measured, "planning a step", "seconds_a_step", 60_000),
        ),
        Fault(
            id="F4",
            metric="bytes that an export reads, of the weights'",
            figure=_share("export", "bytes_read", "weights_bytes"),
            most=1.1,
        ),
        Fault(
            id="F4",
            metric="bytes read in a resume and a save beside the checkpoint once, of the weights'",
            figure=_share(resumed, "bytes_read", "weights_bytes", less=(("checkpoint_bytes", 1),)),
            most=0.1,
        ),
        Fault(
            id="F5",
            metric="bytes that self-play hashes for its books of an iteration, of the weights'",
            figure=_share("self-play's books", "bytes_hashed", "weights_bytes"),
            most=2.1,
        ),
        Fault(
            id="F6",
            metric="bytes written a shard entered, of 1,000 by of 300",
            figure=partial(_grown, "shards entered", "bytes_written", 1_000, 300),
            most=LINEAR,
        ),
        Fault(
            id="F6",
            metric="directories listed to open 1,000 shards",
            figure=partial(_of, stage="shards opened", name="listings", size=1_000),
            most=10,
        ),
        Fault(
            id="F7",
            metric=f"steps of an engine of 256 slots, shards of 64 of {largest:,} prompts, by one stream's",
            figure=_share_of_stream,
            most=LINEAR,
        ),
        Fault(
            id="F8",
            metric=f"CPU ms a prompt to write rollouts, {largest:,} prompts",
            figure=partial(_per, "rollouts", "cpu_seconds", largest, 1000),
            share=0.5,
        ),
        Fault(
            id="F8",
            metric=f"CPU ms a prompt where no rollout is left to do, {largest:,} prompts",
            figure=partial(_per, "rollouts, nothing to do", "cpu_seconds", largest, 1000),
            share=0.5,
        ),
        Fault(
            id="F9",
            metric=f"CPU ms a prompt of the merge on one rank, {largest:,} prompts",
            figure=partial(_per, "merge", "cpu_seconds", largest, 1000),
            share=0.5,
        ),
        Fault(
            id="F10",
            metric="steps of the reference pass for a run of one step, of an epoch of five",
            figure=partial(_of, stage="reference pass", name="passes_for_one_step"),
            most=1,
        ),
        Fault(
            id="F10",
            metric="steps of the reference pass for five steps, killed in the fourth and started again",
            figure=partial(_of, stage="reference pass", name="passes_for_five_steps_and_a_kill"),
            most=6,
        ),
        Fault(
            id="F11",
            metric="bytes a parameter of RMSprop's checkpoint, float32 (mended before)",
            figure=lambda measured: 4 * _share("save of RMSprop", "checkpoint_bytes", "weights_bytes")(measured),
            most=12.2,
        ),
        Fault(
            id="F12",
            metric="bytes read to import again what is imported, of the weights'",
            figure=_share("import, nothing to do", "bytes_read", "weights_bytes"),
            most=2.1,
        ),
        Fault(
            id="F12",
            metric="bytes read to export again what is exported, of the weights'",
            figure=_share("export, nothing to do", "bytes_read", "weights_bytes"),
            most=2.1,
        ),
        Fault(
            id="F13",
            metric="MiB that 1,000 prompts more take in the report",
            figure=partial(_slope, "report", "peak_bytes", largest, 2_000, 1000 / MIB),
            most=2,
        ),
        Fault(
            id="F13",
            metric="MiB that 1,000 prompts more take in rebuilding a dataset",
            figure=partial(_slope, "rebuilding a dataset", "peak_bytes", largest, 2_000, 1000 / MIB),
            most=2,
        ),
        Fault(
            id="F13",
            metric="MiB that 1,000 prompts more take in sampling",
            figure=partial(_slope, "rollouts", "peak_bytes", largest, 2_000, 1000 / MIB),
            most=2,
        ),
        Fault(
            id="F14",
            metric=f"MiB of a dataset of {largest:,} prompts that each other rank opens",
            figure=lambda measured: _of(measured, "opening a dataset, other ranks", "peak_bytes", largest) / MIB,
            share=0.1,
        ),
        *(
            Fault(
                id="F15",
                metric=f"modules imported by {_WORDS.get(name, name)}",
                figure=partial(_of, stage="commands", name=f"modules of {name}"),
                most=most,
            )
            for name, most in (("plan", 1500), ("report", 1500), ("score", 1500), ("train", 500))
        ),
        *(
            Fault(
                id="F15",
                metric=f"CPU seconds of {_WORDS.get(name, name)}",
                figure=partial(_of, stage="commands", name=f"cpu_seconds of {name}"),
            )
            for name in ("plan", "report", "score", "train")
        ),
    )


def _share_of_stream(measured: Measured) -> float:
    found = measured["decoding"]
    figures = found[max(found, key=lambda key: 0 if key.startswith("counts") else int(key))]
    return figures["steps"] / figures["steps_of_one_shard"]


def rows_of(measured: Measured, before: Measured) -> Iterator[Row]:
    """Make rows of what was measured; what was not, in either, is left out."""
    both = [found.get("report", {}) for found in (measured, before or measured)]
    taken = [int(size) for size in both[0] if size in both[1] and not size.startswith("counts")]
    for fault in faults(max(taken, default=0)):
        ours, theirs = _figure(fault, measured), _figure(fault, before)
        if fault.id == "F7" and ours is not None:
            found = measured["decoding"]
            drained = found[max(found, key=lambda key: 0 if key.startswith("counts") else int(key))]
            theirs = drained["steps_drained"] / drained["steps_of_one_shard"]
        if ours is not None:
            yield _row(fault, ours, theirs)
    for stage, found in measured.items():
        yield from _linear(stage, found, before.get(stage, {}))


def _figure(fault: Fault, measured: Measured) -> float | None:
    try:
        return fault.figure(measured)
    except (KeyError, ZeroDivisionError):
        return None


def _row(fault: Fault, ours: float, before: float | None) -> Row:
    target, met = None, None
    if fault.most is not None:
        target, met = f"<= {fault.most:g}", ours <= fault.most
    elif fault.least is not None:
        target, met = f">= {fault.least:g}", ours >= fault.least
    elif fault.share is not None and before is not None:
        target, met = f"<= {fault.share:g} of before", ours <= fault.share * before
    return Row(
        id=fault.id,
        metric=f"{fault.id}: {fault.metric}",
        ours=ours,
        peer=before,
        peer_name=BEFORE,
        ratio=ours / before if before else None,
        target=target,
        met=met,
    )


def _linear(stage: str, found: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[Row]:
    """Say how a stage's counts grow, and what a prompt costs at the largest size and at the smallest."""
    counted = [f"counts {size}" for size in counted_sizes(stage)]
    if counted and all(key in found for key in counted):
        worst, count = _worst(stage, found)
        theirs = _worst(stage, before)[0] if all(key in before for key in counted) else None
        yield Row(
            id="C8",
            metric=f"{stage}: growth of its counts, the worst ({count}); 1 is linear, or none",
            ours=worst,
            peer=theirs,
            peer_name=BEFORE,
            ratio=worst,
            target=f"<= {LINEAR}",
            met=worst <= LINEAR,
        )
    sizes = sorted(int(key) for key in found if not key.startswith("counts"))
    small, large = (found[str(size)] for size in (sizes[0], sizes[-1])) if sizes else ({}, {})
    if "checkpoint_bytes" in large:
        yield from _bytes(stage, large, before.get(str(sizes[-1]), {}))
    elif len(sizes) > 1:
        per_step = "seconds_a_step" in large
        what = "step" if per_step else "shard" if stage.startswith("shards") else "prompt"
        seconds = [
            found[str(size)]["seconds_a_step"] if per_step else found[str(size)]["cpu_seconds"] / size
            for size in (sizes[-1], sizes[0])
        ]
        for unit, ours, theirs in (
            (f"CPU ms a {what}", 1000 * seconds[0], 1000 * seconds[1]),
            ("MiB over the imports", large["peak_bytes"] / MIB, small["peak_bytes"] / MIB),
        ):
            yield Row(
                id="C8",
                metric=f"{stage}: {unit}, {sizes[-1]:,}",
                ours=ours,
                peer=theirs,
                peer_name=f"{sizes[0]:,}",
                ratio=ours / theirs if theirs else None,
                target=None,
                met=None,
            )


def _bytes(stage: str, found: Mapping[str, float], before: Mapping[str, float]) -> Iterator[Row]:
    """Say what a stage moves and hashes of a model."""
    for name in ("bytes_read", "bytes_written", "bytes_hashed"):
        ours = found[name] / found["weights_bytes"]
        theirs = before[name] / before["weights_bytes"] if before else None
        yield Row(
            id="C8",
            metric=f"{stage}: {name.replace('_', ' ')}, of the weights'",
            ours=ours,
            peer=theirs,
            peer_name=BEFORE,
            ratio=ours / theirs if theirs else None,
            target=None,
            met=None,
        )


def _worst(stage: str, found: Mapping[str, Any]) -> tuple[float, str]:
    sizes = counted_sizes(stage)
    grown = {count: growth([found[f"counts {size}"][count] for size in sizes], sizes, count) for count in COUNTS}
    count = max(grown, key=lambda name: grown[name])
    return grown[count], count.replace("_", " ")
