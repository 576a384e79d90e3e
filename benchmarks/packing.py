"""Figure C5: how full the packs are, how even the ranks, how long it takes, beside next-fit.

    python -m benchmarks.packing

Both pack the same shuffled sequences, log-normal in length. The load of a rank is taken over the whole epoch, and over
single steps of `--packs-per-rank` packs a rank, where unevenness is really waited for. Training packs one global batch
at a time: the last rows are of steps as it plans them, with and without prompts computed once.
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
from megatron_sppo.data.selection import TrainingIndex
from megatron_sppo.data.steps import (
    Units,
    divide_shared_step,
    divide_step,
    epoch_rows,
    packed_tokens,
    shared_prompt_units,
    step_units,
)

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
    """Sequences packed at a time in one of the rows, in the epoch's order."""
    global_batches: tuple[int, ...] = (64, 128, 512, 1024)
    """Responses of a step as training plans it."""
    step_ranks: int = 8
    """Data-parallel ranks of those steps."""
    steps: int = 100
    """Steps of each size."""
    num_responses: int = 5
    """Responses of a prompt that is computed once."""
    crossover_length: float = 53_000.0
    """Tokens at which attention costs as much as the matrices; Llama-3-8B's."""
    repeats: int = 5
    machine: str | None = None
    """Folder under benchmarks/results; None names the processor."""


def draw_prompts(num_prompts: int, *, num_responses: int, budget: int) -> TrainingIndex:
    """Draw prompts with their responses -> TrainingIndex, prompt by prompt.

    Log-normal prompts (median 120 tokens, cut at 512) and responses (median 250, cut at 1536), together no longer than
    half the budget.
    """
    generator = np.random.default_rng(0)
    prompt = np.clip(generator.lognormal(np.log(120), 0.9, num_prompts), 8, 512).astype(np.int64).repeat(num_responses)
    response = np.clip(generator.lognormal(np.log(250), 0.6, len(prompt)), 4, 1536).astype(np.int64)
    return TrainingIndex(
        group=np.arange(num_prompts).repeat(num_responses),
        response=np.tile(np.arange(num_responses), num_prompts),
        prompt_lengths=prompt,
        response_lengths=np.minimum(response, budget // 2 - prompt),
        pairs=False,
    )


def next_fit(lengths: np.ndarray, *, budget: int, rows_per_loss: int = 1) -> list[np.ndarray]:
    """Fill one pack at a time, in the order given -> the rows of each pack."""
    bounds, load = [], 0
    for unit, size in enumerate(lengths.reshape(-1, rows_per_loss).sum(axis=1).tolist()):
        if load + size > budget:
            bounds.append(unit * rows_per_loss)
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


def compare(config: PackingConfig, *, rows_per_loss: int) -> list[Row]:
    """Rows of fill, balance and time for units of one row or of pairs."""
    lengths = draw_prompts(config.sequences // 2, num_responses=2, budget=config.budget).lengths
    generator = np.random.default_rng(2)
    lengths = lengths.reshape(-1, rows_per_loss)[generator.permutation(len(lengths) // rows_per_loss)].reshape(-1)
    what = f"{len(lengths)} sequences, {'pairs together, ' if rows_per_loss == 2 else ''}budget {config.budget}"
    packs, seconds = timed(
        lambda: pack(lengths, budget=config.budget, rows_per_loss=rows_per_loss), repeats=config.repeats
    )
    peer, peer_seconds = timed(
        lambda: next_fit(lengths, budget=config.budget, rows_per_loss=rows_per_loss), repeats=config.repeats
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
    ranks = f"{config.ranks} ranks, parity length {config.crossover_length:g}"
    begin = time.perf_counter()
    even = max_over_mean(cost, num_ranks=config.ranks, deal=False)
    assigning = time.perf_counter() - begin
    dealt = max_over_mean(peer_cost, num_ranks=config.ranks, deal=True)
    rows.append(row(f"max/mean rank cost, whole epoch, {ranks}, {what}", even, dealt, "ours <= 1.02", even <= 1.02))
    rows.append(row(f"seconds to assign the epoch's packs (beside the packing), {ranks}", assigning, None, None, None))
    middle, worst = step_balance(cost, config, deal=False)
    peer_middle, peer_worst = step_balance(peer_cost, config, deal=True)
    step = f"max/mean rank cost of a step ({config.packs_per_rank} packs a rank), {ranks}, {what}"
    rows.append(row(f"median {step}", middle, peer_middle, "ours <= 1.02", middle <= 1.02))
    rows.append(row(f"worst {step}", worst, peer_worst, "ours <= 1.02", worst <= 1.02))
    windows = [lengths[first : first + config.window] for first in range(0, len(lengths), config.window)]
    ours, theirs = (
        float(
            lengths.sum()
            / (
                config.budget
                * sum(len(fit(window, budget=config.budget, rows_per_loss=rows_per_loss)) for window in windows)
            )
        )
        for fit in (pack, next_fit)
    )
    rows.append(row(f"fill, {config.window} at a time, {what}", ours, theirs, "ours >= 0.995", ours >= 0.995))
    return rows


def units_of(index: TrainingIndex, rows: np.ndarray, config: PackingConfig, *, shared: bool) -> Units:
    """Make units of single rows, or of whole prompts computed once."""
    if shared:
        return shared_prompt_units(
            index, rows, rows_per_loss=1, capacity=config.budget, crossover_length=config.crossover_length
        )
    return step_units(rows, index.lengths, rows_per_loss=1, crossover_length=config.crossover_length)


def plan_ours(index: TrainingIndex, rows: np.ndarray, config: PackingConfig, *, shared: bool) -> list[list[np.ndarray]]:
    """Plan a step as training does -> rows of each rank's micro-batches."""
    sizes = {"data_parallel_size": config.step_ranks, "packed_sequence_size": config.budget}
    if shared:
        return divide_shared_step(index, rows, rows_per_loss=1, crossover_length=config.crossover_length, **sizes)
    return divide_step(units_of(index, rows, config, shared=False), **sizes)


def plan_peer(index: TrainingIndex, rows: np.ndarray, config: PackingConfig, *, shared: bool) -> list[list[np.ndarray]]:
    """Plan a step by next-fit in the order given, packs to the ranks in turn -> rows of each rank's micro-batches."""
    units = units_of(index, rows, config, shared=shared)
    packs = [
        np.concatenate([units.rows[unit] for unit in members])
        for members in next_fit(units.num_tokens, budget=config.budget)
    ]
    packs += [np.empty(0, dtype=np.int64)] * (-len(packs) % config.step_ranks)
    return [packs[rank :: config.step_ranks] for rank in range(config.step_ranks)]


def judge(
    index: TrainingIndex, plan: list[list[np.ndarray]], config: PackingConfig, *, shared: bool
) -> dict[str, float]:
    """Measure a planned step -> fill of its micro-batches at the longest one's shape, max/mean rank cost, totals."""
    tokens = [packed_tokens(index, rows, share_prompts=shared) for rank in plan for rows in rank]
    assert max(tokens) <= config.budget
    cost = [
        sum(float(units_of(index, rows, config, shared=shared).cost.sum()) for rows in rank if len(rows))
        for rank in plan
    ]
    return {
        "fill": sum(tokens) / (len(tokens) * max(tokens)),
        "balance": max(cost) / statistics.fmean(cost),
        "tokens": sum(tokens),
        "busiest": max(cost),
    }


def training_steps(config: PackingConfig, *, size: int) -> list[Row]:
    """Rows of steps of `size` responses as training plans them, and of what sharing prompts saves there."""
    num_prompts = -(-size * config.steps // config.num_responses)
    index = draw_prompts(num_prompts, num_responses=config.num_responses, budget=config.budget)
    rows, ours_by_kind = [], {}
    for shared in False, True:
        order = epoch_rows(index, seed=2, epoch=0, by_prompt=shared)
        parts = [order[first : first + size] for first in range(0, size * config.steps, size)]
        begin = time.perf_counter()
        plans = [plan_ours(index, part, config, shared=shared) for part in parts]
        seconds = (time.perf_counter() - begin) / len(parts)
        ours = [judge(index, plan, config, shared=shared) for plan in plans]
        peer = [judge(index, plan_peer(index, part, config, shared=shared), config, shared=shared) for part in parts]
        ours_by_kind[shared] = ours
        kind = f"K={config.num_responses} responses behind one prompt, " if shared else ""
        what = f"{kind}steps of {size} responses, {config.step_ranks} ranks, budget {config.budget}"
        for metric, key, pick in (
            ("median fill of micro-batches, all in the longest one's shape", "fill", statistics.median),
            ("median max/mean rank cost", "balance", statistics.median),
            ("worst max/mean rank cost", "balance", max),
        ):
            found, theirs = pick(step[key] for step in ours), pick(step[key] for step in peer)
            target, met = ("ours <= 1.02", found <= 1.02) if key == "balance" else (None, None)
            rows.append(row(f"{metric}, {what}", found, theirs, target, met))
        rows.append(row(f"seconds to plan a step, {what}", seconds, None, None, None))
    for metric, key in ("tokens saved by sharing prompts", "tokens"), ("busiest rank's cost saved", "busiest"):
        plain, once = (statistics.fmean(step[key] for step in ours_by_kind[shared]) for shared in (False, True))
        rows.append(row(f"{metric}, {what}", 1 - once / plain, None, None, None))
    return rows


def pack_cost(lengths: np.ndarray, packs: list[np.ndarray], config: PackingConfig) -> np.ndarray:
    """Estimate each pack's time -> [P]."""
    cost = document_cost(lengths, crossover_length=config.crossover_length)
    return np.array([cost[rows].sum() for rows in packs])


def row(
    metric: str,
    ours: float,
    peer: float | None,
    target: str | None,
    met: bool | None,
    spread: list[float] | None = None,
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
    rows = compare(config, rows_per_loss=1) + compare(config, rows_per_loss=2)
    for size in config.global_batches:
        rows += training_steps(config, size=size)
    write_results("packing", rows, machine=config.machine or describe_cpu(), packages=["numpy"])


if __name__ == "__main__":
    run_tool(main, name=NAME)
