"""Figure C8: how the cost of every stage grows with prompts, shards and the model's size, its networks taken away.

    OMP_NUM_THREADS=1 python -m benchmarks.scale --work EMPTY_DIR                 every stage: 25 minutes, 6 GB of disk
    OMP_NUM_THREADS=1 python -m benchmarks.scale --work DIR --stages report       one; what it needs is made first

K = 5, 150 tokens a prompt, 400 an answer; a sampler and a judge that answer at once. Each stage runs in a process of
its own. Its cost is counted (calls of our functions, files, bytes) at small sizes, and taken as CPU seconds and memory
at large ones: counts say whether it is linear, for these cores are shared. What was measured is kept in
DIR/measured.json, and not measured again; that of another commit, given with --before, stands beside.
"""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.instruments import COUNTS, in_child, install
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.errors import ConfigError
from megatron_sppo.storage import read_json, write_json

NAME = "scale.py"
COUNTED = (500, 1000, 2000)
"""Prompts, where calls of functions are counted."""
PROMPTS = (2_000, 10_000, 60_000)
SYNTHETIC = (*PROMPTS, 600_000)
"""Of stages that need nothing but lengths and numbers."""
SHARDS = (300, 1_000, 3_000, 9_375)
"""Of which the last are those of 600,000 prompts."""
HIDDEN_SIZES = (64, 128, 256)
"""Of models of 4 to 17 million parameters."""
SETTINGS = {"shard_size": 64, "tokens": 400, "global_batch_size": 1024, "num_steps": 20}
_ONE_SIZE = ("commands", "reference pass", "save of RMSprop")
_OF_LENGTHS = ("listing an epoch", "planning a step", "reference file")

SHORT_SIZES = (200, 400, 800)
SHORT_SETTINGS = {"shard_size": 8, "tokens": 40, "global_batch_size": 128, "num_steps": 4}
LINEAR = 1.1
"""What is linear grows by at most so many times its part: a tenth more is let pass."""
_SLACK = {"calls": 64, "opens": 4, "listings": 4, "entries": 16}
_SLACK_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """What is measured."""

    work: Path
    """Directory for what the stages read and write, and for measured.json."""
    stages: tuple[str, ...] = ()
    """These alone; none: all of them."""
    largest: int = 600_000
    """No size above this."""
    before: Path | None = None
    """measured.json of another commit, to stand beside."""
    machine: str | None = None
    """Folder of the results; unset: named after the processor."""


def sizes_of(name: str) -> tuple[int, ...]:
    """List the sizes at which a stage's time and memory are taken -> ascending."""
    from benchmarks.scale_checkpoints import CHECKPOINTS

    if name in CHECKPOINTS:
        return HIDDEN_SIZES[-1:] if name in _ONE_SIZE else HIDDEN_SIZES
    if name.startswith("shards"):
        return SHARDS
    return SYNTHETIC if name in _OF_LENGTHS else PROMPTS


def measure_stage(name: str, work: Path, size: int, counts_calls: bool) -> Any:
    """Measure one stage at one size, in this process, whose imports and first use are made before -> figures."""
    import megatron_sppo
    from benchmarks.scale_checkpoints import CHECKPOINTS
    from benchmarks.scale_stages import measure

    kind = "hidden" if name in CHECKPOINTS else "shards" if name.startswith("shards") else "prompts"
    if kind != "hidden":
        warm = SETTINGS | {"shard_size": 8, "tokens": 8, "global_batch_size": 16, "num_steps": 2}
        with tempfile.TemporaryDirectory(dir=work) as directory:
            measure(name, Path(directory), 32, **warm)
    package = Path(str(megatron_sppo.__file__)).parent
    place = work / f"{kind}-{size}{'-counted' if counts_calls else ''}"
    return measure(name, place, size, functions_of=package if counts_calls else None, **SETTINGS)


def count_stages(work: Path) -> dict[str, dict[str, list[float]]]:
    """Count the stages that grow with prompts, at three small sizes -> {stage: {count: at each size}}.

    In a process of its own: the counters stay in it for ever.
    """
    import megatron_sppo

    install()
    logging.disable(logging.WARNING)
    from benchmarks.scale_stages import STAGES, measure

    os.fsync = lambda _: None  # type: ignore[assignment]  # counts are taken, not seconds
    package = Path(str(megatron_sppo.__file__)).parent
    counted: dict[str, dict[str, list[float]]] = {}
    for name in STAGES:
        kind = "shards" if name.startswith("shards") else "prompts"
        measure(name, work / f"{kind}-warm", 32, **SHORT_SETTINGS)
        taken = [
            measure(name, work / f"{kind}-{size}", size, functions_of=package, **SHORT_SETTINGS) for size in SHORT_SIZES
        ]
        kinds = [*COUNTS, *(["elements_a_step"] if "elements_a_step" in taken[0] else [])]
        counted[name] = {count: [float(figures[count]) for figures in taken] for count in kinds}
    return counted


def growth(values: Sequence[float], sizes: Sequence[int], count: str) -> float:
    """Say how a count grows from the second size to the third, as a multiple of its growth to the second -> 1: linear.

    What a stage costs at any size drops out. Of next to nothing, no growth is told: 1.
    """
    first, second, third = values
    slack = _SLACK.get(count, _SLACK_BYTES)
    before, after = (second - first) / (sizes[1] - sizes[0]), (third - second) / (sizes[2] - sizes[1])
    return 1.0 if abs(third - second) <= slack else after / max(before, slack / 4 / (sizes[1] - sizes[0]))


def main() -> None:
    """Measure the stages that are asked for, keep their figures, and write the results once all are there."""
    config = parse(ScaleConfig, name=NAME, description=str(__doc__))
    install()
    logging.disable(logging.WARNING)
    from benchmarks.scale_checkpoints import STAGES  # here, so that children have it, and after the counters

    if unknown := set(config.stages) - set(STAGES):
        raise ConfigError(f"{sorted(unknown)[0]!r} is no stage. Use --stages with some of: {', '.join(STAGES)}.")
    kept = config.work / "measured.json"
    measured: dict[str, dict[str, Any]] = read_json(kept) if kept.is_file() else {}
    for name in config.stages or STAGES:
        for size, counts_calls in _runs(name, config.largest):
            key = f"{'counts ' if counts_calls else ''}{size}"
            if key in measured.get(name, {}):
                continue
            figures = in_child(measure_stage, name, config.work.resolve(), size, counts_calls)
            measured.setdefault(name, {})[key] = figures
            write_json(kept, measured)
            print(f"{name}, {size}{', counted' if counts_calls else ''}: {_words(figures)}", flush=True)


def _runs(name: str, largest: int) -> Sequence[tuple[int, bool]]:
    sizes = sizes_of(name)
    counted = COUNTED if sizes[0] == PROMPTS[0] else ()
    return [*((size, True) for size in counted), *((size, False) for size in sizes if size <= largest)]


def _words(figures: dict[str, float]) -> str:
    return json.dumps({name: round(value, 5) for name, value in figures.items() if value})


if __name__ == "__main__":
    run_tool(main, name=NAME)
