"""Sizes at which `benchmarks.scale` measures, and how a count is said to grow."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.instruments import COUNTS, install

COUNTED = (500, 1000, 2000)
"""Prompts, where calls of functions are counted."""
COUNTED_SHARDS = (50, 100, 200)
COUNTED_REPORT = (640, 1280, 2560)
"""Prompts of the report, whose tenth, held out, fills whole shards."""
PROMPTS = (2_000, 10_000, 60_000)
SYNTHETIC = (*PROMPTS, 600_000)
"""Of stages that need nothing but lengths and numbers."""
SHARDS = (300, 1_000, 9_375)
"""Of which the last are those of 600,000 prompts."""
HIDDEN_SIZES = (64, 128, 256)
"""Of models of 4 to 17 million parameters."""
SETTINGS = {"shard_size": 64, "tokens": 400, "global_batch_size": 1024, "num_steps": 20}
OF_SHORT_ANSWERS = ("merge, short answers", "report, short answers")
"""Stages whose rollouts would take 11 GB at 600,000 prompts: there with answers of 8 tokens."""
SHORT_ANSWERS = SETTINGS | {"shard_size": 512, "tokens": 8}
ONE_SIZE = ("commands", "reference pass", "save of RMSprop")
OF_LENGTHS = ("listing an epoch", "planning a step", "reference file")

SHORT_SIZES = (200, 400, 800)
SHORT_SETTINGS = {"shard_size": 4, "tokens": 40, "global_batch_size": 128, "num_steps": 4}
LINEAR = 1.1
"""What is linear grows by at most so many times its part: a tenth more is let pass."""
_SLACK = {"calls": 64, "opens": 4, "listings": 4, "entries": 16}
_SLACK_BYTES = 4096


def sizes_of(name: str) -> tuple[int, ...]:
    """List the sizes at which a stage's time and memory are taken -> ascending; of a model, its hidden sizes."""
    from benchmarks.scale_checkpoints import CHECKPOINTS  # not the tests': they need no checkpoints

    if name in CHECKPOINTS:
        return HIDDEN_SIZES[-1:] if name in ONE_SIZE else HIDDEN_SIZES
    if name.startswith("shards"):
        return SHARDS
    if name in OF_SHORT_ANSWERS:
        return (PROMPTS[0], *SYNTHETIC[-2:])
    return SYNTHETIC if name in OF_LENGTHS else PROMPTS


def counted_sizes(name: str) -> tuple[int, ...]:
    """List the sizes at which a stage's calls are counted -> ascending, each twice the one before; none of a model."""
    if name.startswith("shards"):
        return COUNTED_SHARDS
    if name == "report":
        return COUNTED_REPORT
    if name in OF_SHORT_ANSWERS:
        return ()
    return COUNTED if sizes_of(name)[0] == PROMPTS[0] else ()


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

    What a stage costs at any size drops out.
    """
    first, second, third = values
    slack = _SLACK.get(count, _SLACK_BYTES)
    linear = (second - first) * (sizes[2] - sizes[1]) / (sizes[1] - sizes[0])
    if third - second <= linear + slack:  # a block or a shard more, by rounding, is no growth
        return 1.0
    return (third - second) / max(linear, slack / 2)
