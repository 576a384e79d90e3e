"""What a training run does about numbers that cannot be right, machines that compute wrongly, and ranks that hang."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_sppo.config import LAYOUT, TUNABLE, NonNegativeFloat, NonNegativeInt, PositiveInt, Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Bad steps, replicas that differ, and ranks that hang."""

    on_bad_step: Annotated[Literal["stop", "skip"], TUNABLE] = "stop"
    """What becomes of a step whose loss, log-probabilities, targets or gradient are not finite, or that is a spike
    (spike_factor). It is found before the update, on all ranks. stop: the run ends, exit code 2. skip: weights,
    optimizer and its moments stay as they are, and the run goes on with the next step's responses; the learning-rate
    schedule counts the step. Either way what, rank and responses are said."""
    spike_factor: Annotated[float | None, Range(1, 1e6, above=True), TUNABLE] = None
    """A step is bad too if its loss or gradient norm is more than this many times the median of the last 50 steps that
    were taken (of at least 10). Unset: never, as clip_grad bounds each update and SPPO's loss begins at its largest."""
    max_bad_steps: Annotated[PositiveInt, TUNABLE] = 10
    """With on_bad_step skip, bad steps in a row after which the run stops, exit code 2: then it is not the data."""
    check_replicas: Annotated[NonNegativeInt, LAYOUT] = 0
    """Compare checksums of all weights, and of the optimizer's state where it is not sharded, between the ranks that
    must hold the same ones after every so many steps and before every save. A difference ends the run, exit code 3,
    without saving. 0: never."""
    watchdog_seconds: Annotated[NonNegativeFloat, LAYOUT] = 1200.0
    """Seconds without progress of a rank after which the job ends, exit code 4: every rank writes its stacks under
    --save/hangs, and those that are late are named with host and phase. More than the longest save or micro-batch
    takes; at most two thirds of distributed_timeout_minutes count. 0: no watchdog."""

    def __post_init__(self) -> None:
        check_ranges(self)
