"""What `benchmarks.scale` measured, as rows: each of fifteen faults as it was and is, then every stage."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.instruments import COUNTS
from benchmarks.record import Row
from benchmarks.scale_counts import HIDDEN_SIZES, LINEAR, counted_sizes, growth, sizes_of

Measured = Mapping[str, Mapping[str, Mapping[str, float]]]
"""{stage: {size, or "counts SIZE": {figure: value}}}"""
Before = Mapping[str, float]
"""{metric of a row: what it was}"""
BEFORE = "commit 87e42d6"
MIB = 2**20
_COUNTS_AT_ANY_SIZE = tuple(count for count in COUNTS if count not in ("calls", "entries"))
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
            figure=partial(_of_one_stream, "steps", largest),
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


def _of_one_stream(steps: str, size: int, measured: Measured) -> float:
    return _of(measured, "decoding", steps, size) / _of(measured, "decoding", "steps_of_one_shard", size)


def figures_before(results: Mapping[str, Any]) -> dict[str, float]:
    """Take from earlier results what stands in them of the commit before -> {metric: figure}."""
    return {row["metric"]: row["peer"] for row in results["rows"] if row["peer_name"] == BEFORE and row["peer"]}


def rows_of(measured: Measured, before: Before) -> Iterator[Row]:
    """Make rows of what was measured; what was not is left out."""
    largest = _largest(measured, before)
    for fault in faults(largest):
        ours, theirs = _figure(fault, measured), before.get(_metric(fault))
        if ours is not None and fault.id == "F7":  # the engine as it was, of the same shards
            theirs = _of_one_stream("steps_drained", largest, measured)
        if ours is not None:
            yield _row(fault, ours, theirs)
    for stage, found in measured.items():
        yield from _linear(stage, found, before)


def _largest(measured: Measured, before: Before) -> int:
    """Choose the prompts that faults are told at -> the most that were measured both times, or now."""
    sizes = [int(size) for size in measured.get("merge", {}) if not size.startswith("counts")]
    known = [size for size in sizes if any(_metric(fault) in before for fault in faults(size) if fault.id == "F9")]
    return max(known or sizes, default=0)


def _metric(fault: Fault) -> str:
    return f"{fault.id}: {fault.metric}"


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
        metric=_metric(fault),
        ours=ours,
        peer=before,
        peer_name=BEFORE,
        ratio=ours / before if before else None,
        target=target,
        met=met,
    )


def _linear(stage: str, found: Mapping[str, Any], before: Before) -> Iterator[Row]:
    """Say how a stage's counts grow, and what a prompt costs at the largest size and at the smallest."""
    large_sizes = sizes_of(stage)[-3:]
    for counts, sizes, keys, words in (
        (COUNTS, counted_sizes(stage), [f"counts {size}" for size in counted_sizes(stage)], ""),
        (_COUNTS_AT_ANY_SIZE, large_sizes, list(map(str, large_sizes)), f" up to {large_sizes[-1]:,}"),
    ):
        is_of_prompts = len(sizes) == 3 and "checkpoint_bytes" not in found.get(keys[-1], {})
        if is_of_prompts and all(key in found for key in keys):
            yield _growth(f"{stage}: growth of its counts{words}", found, counts, sizes, keys, before)
    sizes = sorted(int(key) for key in found if not key.startswith("counts"))
    small, large = (found[str(size)] for size in (sizes[0], sizes[-1])) if sizes else ({}, {})
    if "checkpoint_bytes" in large:
        yield from _bytes(stage, large, before)
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


def _bytes(stage: str, found: Mapping[str, float], before: Before) -> Iterator[Row]:
    """Say what a stage moves and hashes of a model."""
    for name in ("bytes_read", "bytes_written", "bytes_hashed"):
        metric = f"{stage}: {name.replace('_', ' ')}, of the weights'"
        ours, theirs = found[name] / found["weights_bytes"], before.get(metric)
        yield Row(
            id="C8",
            metric=metric,
            ours=ours,
            peer=theirs,
            peer_name=BEFORE,
            ratio=ours / theirs if theirs else None,
            target=None,
            met=None,
        )


def _growth(
    words: str,
    found: Mapping[str, Any],
    counts: Sequence[str],
    sizes: Sequence[int],
    keys: Sequence[str],
    before: Before,
) -> Row:
    """Say how the count that grows most grows from the second of three sizes to the third."""
    grown = {count: growth([found[key][count] for key in keys], sizes, count) for count in counts}
    count = max(grown, key=lambda name: grown[name])
    theirs = next((figure for metric, figure in before.items() if metric.startswith(f"{words}, ")), None)
    return Row(
        id="C8",
        metric=f"{words}, the worst ({count.replace('_', ' ')}); 1 is linear, or none",
        ours=grown[count],
        peer=theirs,
        peer_name=BEFORE,
        ratio=grown[count],
        target=f"<= {LINEAR}",
        met=grown[count] <= LINEAR,
    )
