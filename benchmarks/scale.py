"""Figure C8: how the cost of every stage grows with prompts, shards and the model's size, its networks taken away.

    OMP_NUM_THREADS=1 python -m benchmarks.scale --work EMPTY_DIR                 every stage: 25 minutes, 6 GB of disk
    OMP_NUM_THREADS=1 python -m benchmarks.scale --work DIR --stages report       one; what it needs is made first

K = 5, 150 tokens a prompt, 400 an answer; a sampler and a judge that answer at once. Each stage runs in a process of
its own. Its cost is counted (calls of our functions, files, bytes) at small sizes, and taken as CPU seconds and memory
at large ones: counts say whether it is linear, for these cores are shared. What was measured is kept in
DIR/measured.json, and not measured again. Figures of the commit before stand beside, from the results of --before.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.instruments import install
from benchmarks.record import describe_machine, in_child, write_results
from benchmarks.scale_counts import OF_SHORT_ANSWERS, SETTINGS, SHORT_ANSWERS, counted_sizes, sizes_of
from benchmarks.scale_rows import figures_before, rows_of
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import read_json, write_json

NAME = "scale.py"


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
    """Earlier results, such as the committed scale.json: what stands in them of commit 87e42d6 is taken over."""
    machine: str | None = None
    """Folder of the results; unset: named after the processor."""


def measure_stage(name: str, work: Path, size: int, counts_calls: bool) -> Any:
    """Measure one stage at one size, in this process, whose imports and first use are made before -> figures."""
    import megatron_sppo
    from benchmarks.scale_checkpoints import CHECKPOINTS
    from benchmarks.scale_stages import measure

    kind, settings = "prompts", SETTINGS
    if name in OF_SHORT_ANSWERS:
        kind, settings, name = "short", SHORT_ANSWERS, name.partition(",")[0]
    elif name in CHECKPOINTS or name.startswith("shards"):
        kind = "hidden" if name in CHECKPOINTS else "shards"
    if kind != "hidden":
        warm = SETTINGS | {"shard_size": 8, "tokens": 8, "global_batch_size": 16, "num_steps": 2}
        with tempfile.TemporaryDirectory(dir=work) as directory:
            measure(name, Path(directory), 32, **warm)
    package = Path(str(megatron_sppo.__file__)).parent
    place = work / f"{kind}-{size}{'-counted' if counts_calls else ''}"
    return measure(name, place, size, functions_of=package if counts_calls else None, **settings)


def main() -> None:
    """Measure the stages that are asked for, keep their figures, and write the results of all that were measured."""
    config = parse(ScaleConfig, name=NAME, description=str(__doc__))
    install()
    logging.disable(logging.WARNING)
    from benchmarks.scale_checkpoints import STAGES  # here, so that children have it, and after the counters

    stages = (*STAGES, *OF_SHORT_ANSWERS)
    if unknown := set(config.stages) - set(stages):
        raise ConfigError(f"{sorted(unknown)[0]!r} is no stage. Use --stages with some of: {', '.join(stages)}.")
    config.work.mkdir(parents=True, exist_ok=True)
    kept = config.work / "measured.json"
    measured: dict[str, dict[str, Any]] = read_json(kept) if kept.is_file() else {}
    for name in config.stages or stages:
        for size, counts_calls in _runs(name, config.largest):
            key = f"{'counts ' if counts_calls else ''}{size}"
            if key in measured.get(name, {}):
                continue
            figures = in_child(measure_stage, name, config.work.resolve(), size, counts_calls, start_method="fork")
            measured.setdefault(name, {})[key] = figures
            write_json(kept, measured)
            print(f"{name}, {size}{', counted' if counts_calls else ''}: {_words(figures)}", flush=True)
    before = {} if config.before is None else figures_before(read_json(config.before))
    machine = config.machine or describe_machine()
    write_results(
        "scale", list(rows_of(measured, before)), machine=machine, packages=["torch", "megatron-core", "numpy"]
    )


def _runs(name: str, largest: int) -> Sequence[tuple[int, bool]]:
    counted = [(size, True) for size in counted_sizes(name)]
    return [*counted, *((size, False) for size in sizes_of(name) if size <= largest)]


def _words(figures: dict[str, float]) -> str:
    return json.dumps({name: round(value, 5) for name, value in figures.items() if value})


if __name__ == "__main__":
    run_tool(main, name=NAME)
