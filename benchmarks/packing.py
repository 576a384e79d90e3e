"""Figure C5: how full the packs are, how even the ranks, how long it takes, beside next-fit.

    python -m benchmarks.packing

Both pack the same shuffled sequences, log-normal in length. The load of a rank is taken over the whole epoch, and over
single steps of `--packs-per-rank` packs a rank, where unevenness is really waited for.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.record import Row, describe_cpu, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.data.packing import assign_to_ranks, document_cost, pack

NAME = "packing.py"


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Sizes of the comparison."""

    sequences: int = 1_000_000
    budget: int = 8192
    """Tokens of a pack."""
    ranks: int = 64
    """Data-parallel ranks."""
    packs_per_rank: int = 4
    """Packs of a rank in one step."""
    window: int = 4096
    """Sequences packed at a time in the last row: those of one step, in the epoch's order."""
    parity_length: float = 53_000.0
    """Tokens at which attention costs as much as the matrices; Llama-3-8B's."""
    repeats: int = 5
    machine: str | None = None
    """Folder under benchmarks/results; None names the processor."""


def draw_lengths(num_sequences: int, *, budget: int) -> np.ndarray:
    """Draw prompt and response together -> [N] tokens: log-normal prompts (median 120, cut at 512) and responses
    (median 250, cut at 1536), no longer than half the budget, in pairs that share their prompt.
    """
    generator = np.random.default_rng(0)
    prompt = np.clip(generator.lognormal(np.log(120), 0.9, num_sequences // 2), 8, 512).astype(np.int64).repeat(2)
    response = np.clip(generator.lognormal(np.log(250), 0.6, len(prompt)), 4, 1536).astype(np.int64)
    return np.minimum(prompt + response, budget // 2)


def next_fit(lengths: np.ndarray, *, budget: int, unit_size: int = 1) -> list[np.ndarray]:
    """Fill one pack at a time, in the order given -> the rows of each pack."""
    bounds, load = [], 0
    for unit, size in enumerate(lengths.reshape(-1, unit_size).sum(axis=1).tolist()):
        if load + size > budget:
            bounds.append(unit * unit_size)
            load = 0
        load += size
    return np.split(np.arange(len(lengths)), bounds)


def fill(lengths: np.ndarray, packs: list[np.ndarray], *, budget: int) -> float:
    """Share of the packs' tokens that are real -> (0, 1]; every row is checked to be there once."""
    assert (np.bincount(np.concatenate(packs), minlength=len(lengths)) == 1).all()
    assert max(int(lengths[rows].sum()) for rows in packs) <= budget
    return float(lengths.sum() / (len(packs) * budget))


def max_over_mean(cost: np.ndarray, *, num_ranks: int, deal: bool) -> float:
    """Load of the busiest rank over the mean; `deal` gives packs out in turn in place of longest first."""
    shares = [np.arange(rank, len(cost), num_ranks) for rank in range(num_ranks)]
    loads = [float(cost[members].sum()) for members in (shares if deal else assign_to_ranks(cost, num_ranks=num_ranks))]
    return max(loads) / statistics.fmean(loads)


def step_balance(cost: np.ndarray, config: PackingConfig, *, deal: bool) -> tuple[float, float]:
    """Pack cost in a shuffled order, step by step -> median and greatest max/mean of a step."""
    size = config.ranks * config.packs_per_rank
    shuffled = np.random.default_rng(1).permutation(cost)
    steps = [shuffled[first : first + size] for first in range(0, len(cost) - size + 1, size)]
    ratios = [max_over_mean(step, num_ranks=config.ranks, deal=deal) for step in steps]
    return statistics.median(ratios), max(ratios)


def timed(function: Callable[[], list[np.ndarray]], *, repeats: int) -> tuple[list[np.ndarray], list[float]]:
    """Call a function `repeats` times -> its last result, seconds of each."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        found = function()
        seconds.append(time.perf_counter() - begin)
    return found, seconds


def compare(config: PackingConfig, *, unit_size: int) -> list[Row]:
    """Rows of fill, balance and time for units of one row or of pairs."""
    lengths = draw_lengths(config.sequences, budget=config.budget)
    generator = np.random.default_rng(2)
    lengths = lengths.reshape(-1, unit_size)[generator.permutation(len(lengths) // unit_size)].reshape(-1)
    what = f"{len(lengths)} sequences, {'pairs together, ' if unit_size == 2 else ''}budget {config.budget}"
    packs, seconds = timed(lambda: pack(lengths, budget=config.budget, unit_size=unit_size), repeats=config.repeats)
    peer, peer_seconds = timed(
        lambda: next_fit(lengths, budget=config.budget, unit_size=unit_size), repeats=config.repeats
    )
    full, peer_full = (fill(lengths, found, budget=config.budget) for found in (packs, peer))
    rows = [
        row("fill, " + what, full, peer_full, "ours >= 0.995", full >= 0.995),
        row(
            "seconds to pack, " + what,
            statistics.median(seconds),
            statistics.median(peer_seconds),
            "ours < 10",
            max(seconds) < 10,
            spread=[min(seconds), max(seconds)],
        ),
    ]
    cost = pack_cost(lengths, packs, config)
    peer_cost = pack_cost(lengths, peer, config)
    ranks = f"{config.ranks} ranks, parity length {config.parity_length:g}"
    begin = time.perf_counter()
    even = max_over_mean(cost, num_ranks=config.ranks, deal=False)
    assigning = time.perf_counter() - begin
    dealt = max_over_mean(peer_cost, num_ranks=config.ranks, deal=True)
    rows.append(row(f"max/mean rank cost, whole epoch, {ranks}, {what}", even, dealt, "ours <= 1.02", even <= 1.02))
    rows.append(row(f"seconds to assign the epoch's packs, {ranks}", assigning, None, "(part of < 10)", None))
    middle, worst = step_balance(cost, config, deal=False)
    peer_middle, peer_worst = step_balance(peer_cost, config, deal=True)
    step = f"max/mean rank cost of a step ({config.packs_per_rank} packs a rank), {ranks}, {what}"
    rows.append(row(f"median {step}", middle, peer_middle, "ours <= 1.02", middle <= 1.02))
    rows.append(row(f"worst {step}", worst, peer_worst, "ours <= 1.02", worst <= 1.02))
    windows = [lengths[first : first + config.window] for first in range(0, len(lengths), config.window)]
    ours, theirs = (
        float(
            lengths.sum()
            / (config.budget * sum(len(fit(window, budget=config.budget, unit_size=unit_size)) for window in windows))
        )
        for fit in (pack, next_fit)
    )
    rows.append(row(f"fill, {config.window} at a time, {what}", ours, theirs, "ours >= 0.995", ours >= 0.995))
    return rows


def pack_cost(lengths: np.ndarray, packs: list[np.ndarray], config: PackingConfig) -> np.ndarray:
    """Estimate each pack's time -> [P]."""
    cost = document_cost(lengths, parity_length=config.parity_length)
    return np.array([cost[rows].sum() for rows in packs])


def row(
    metric: str, ours: float, peer: float | None, target: str, met: bool | None, spread: list[float] | None = None
) -> Row:
    """One figure of C5; the number that the target speaks of is ours."""
    return Row(
        id="C5",
        metric=metric,
        ours=ours,
        peer=peer,
        peer_name="next-fit, dealt in turn",
        ratio=ours,
        target=target,
        met=met,
        spread=spread,
    )


def main() -> None:
    """Measure and write benchmarks/results/<machine>/packing.json."""
    config = parse(PackingConfig, name=NAME, description=str(__doc__))
    rows = compare(config, unit_size=1) + compare(config, unit_size=2)
    write_results("packing", rows, machine=config.machine or describe_cpu(), packages=["numpy"])


if __name__ == "__main__":
    run_tool(main, name=NAME)
