"""Figure C7s: the pool's driver with 600 engines that are simulated, on a simulated clock.

    python -m benchmarks.rollout_simulation

The loop and the bookkeeping are those of a real stage (`cluster.pool.drive`); engines and the time that passes in them
are made up. An engine has slots for so many answers at once, as many steps for each as it has tokens, and takes the
next shard before the last has drained, as `rollout.vllm_engine.RequestStream` does. Lengths are log-normal. Engines
die at random moments with all that they had at work, and are back a minute later. While the driver writes a shard
everything else waits for it. Of real time only the driver's own is measured: what it takes to give shards out and take
them back, without writing them.
"""

import heapq
import itertools
import logging
import math
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.record import Row, describe_cpu, figure, write_results
from megatron_sppo.cluster.pool import drive
from megatron_sppo.cluster.worker import Lost, Numbered, Reply
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import Fraction, PositiveFloat, PositiveInt, Seed, parse

NAME = "rollout_simulation.py"
POLL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """What is simulated."""

    engines: PositiveInt = 600
    prompts: PositiveInt = 60_000
    shard_size: PositiveInt = 4
    """Prompts; what `megatron-sppo rollouts` chooses for so many on GPUs."""
    responses: PositiveInt = 5
    """K."""
    slots: PositiveInt = 8
    """Answers that an engine computes at once."""
    median_tokens: PositiveFloat = 250.0
    sigma: PositiveFloat = 0.6
    max_tokens: PositiveInt = 1024
    step_seconds: PositiveFloat = 0.02
    """One token of every answer that is at work."""
    dying: Fraction = 0.01
    """Engines that die in the stage."""
    restart_seconds: PositiveFloat = 60.0
    write_seconds: PositiveFloat = 0.01
    """For which the driver writes a shard."""
    round_trip_seconds: PositiveFloat = 0.002
    seed: Seed = 1
    machine: str | None = None
    """Folder under benchmarks/results; unset: named after the processor."""


@dataclass(frozen=True)
class Task:
    """A shard: the lengths of its answers, all prompts' one after the other."""

    index: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Done:
    """A shard that was answered."""

    index: int


@dataclass
class Engine:
    """An engine, up to its own clock."""

    slots: int
    step_seconds: float
    life: int = 0
    now: float = 0.0
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    """(shard, tokens) of answers without a slot."""
    at_work: list[tuple[float, int, int]] = field(default_factory=list)
    """Heap of (when it ends, number, shard)."""
    left: dict[int, int] = field(default_factory=dict)
    """Answers of each shard that have not ended."""
    results: list[int] = field(default_factory=list)
    busy_seconds: float = 0.0
    slot_seconds: float = 0.0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def num_unfinished(self) -> int:
        """Answers that have not ended."""
        return len(self.waiting) + len(self.at_work)

    @property
    def wants(self) -> bool:
        """Whether it takes another shard: before fewer answers are left than it has slots (`RequestStream`)."""
        return self.num_unfinished < self.slots + self.slots // 2

    def take(self, task: Task) -> None:
        """Take a shard."""
        self.left[task.index] = len(task.tokens)
        self.waiting.extend((task.index, tokens) for tokens in task.tokens)
        self._fill()

    def advance(self, now: float) -> None:
        """Compute until then."""
        while self.at_work and self.at_work[0][0] <= now:
            end, _, shard = self.at_work[0]
            self._pass(end)
            heapq.heappop(self.at_work)
            self.left[shard] -= 1
            if not self.left[shard]:
                del self.left[shard]
                self.results.append(shard)
            self._fill()
        self._pass(now)

    def die(self, *, back_at: float) -> None:
        """Lose everything."""
        self.life, self.now = self.life + 1, back_at
        for lost in (self.waiting, self.at_work, self.left, self.results):
            lost.clear()

    def _pass(self, now: float) -> None:
        if now <= self.now:
            return
        if self.at_work:
            self.busy_seconds += now - self.now
            self.slot_seconds += (now - self.now) * len(self.at_work)
        self.now = now

    def _fill(self) -> None:
        while self.waiting and len(self.at_work) < self.slots:
            shard, tokens = self.waiting.popleft()
            heapq.heappush(self.at_work, (self.now + tokens * self.step_seconds, next(self._numbers), shard))


class SimulatedTeam:
    """Engines on one simulated clock (`cluster.pool.Team`)."""

    def __init__(self, config: SimulationConfig, chance: random.Random, *, expected_seconds: float) -> None:
        """Choose who dies, and when within the time that the stage is expected to take."""
        self._config, self.num_workers, self.now = config, config.engines, 0.0
        self.engines = [Engine(config.slots, config.step_seconds) for _ in range(config.engines)]
        self.down_seconds = 0.0
        self._numbers = itertools.count(1)
        self._events: list[tuple[float, int, str, int, int]] = []
        """Heap of (when, number, what, worker, call that it belongs to)."""
        self._calls: dict[int, tuple[int, bool]] = {}
        """Of each engine the call under way: (its number, whether the driver has more)."""
        for worker in chance.sample(range(config.engines), round(config.dying * config.engines)):
            self._at(chance.uniform(0.05, 0.9) * expected_seconds, "death", worker)

    def exchange(
        self, worker: int, life: str | None, tasks: tuple[Numbered, ...] = (), *, has_more: bool, is_end: bool
    ) -> None:
        """Begin a call."""
        engine, begin, call = self.engines[worker], self.now + self._config.round_trip_seconds / 2, next(self._numbers)
        self._calls[worker] = (call, has_more)
        engine.advance(begin)
        if life is None or life == str(engine.life):
            for task in tasks:
                assert isinstance(task, Task)
                engine.take(task)
        self._at(begin + POLL_SECONDS, "reply", worker, call)
        self._look(worker, begin)

    def replies(self, seconds: float) -> list[tuple[int, Reply | Lost]]:
        """Let the clock run to the next thing that the driver hears of."""
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            when, _, what, worker, call = heapq.heappop(self._events)
            self.now = max(self.now, when)
            if what == "death":
                return [self._die(worker)]
            if what == "back":
                self.exchange(worker, None, has_more=True, is_end=False)
            elif self._calls.get(worker, (0, False))[0] == call:
                self.engines[worker].advance(when)
                if what == "reply":
                    return [self._reply(worker)]
                self._look(worker, when)
        self.now = max(self.now, until)
        return []

    def spend(self, seconds: float) -> None:
        """Let the driver be busy."""
        self.now += seconds

    def missing(self) -> str:
        """Nothing is."""
        return "nothing"

    def restart(self, worker: int) -> None:
        """Engines have no faults."""
        raise AssertionError(worker)

    def dismiss(self, worker: int) -> None:
        """Engines come back always."""
        raise AssertionError(worker)

    def close(self, *, is_orderly: bool) -> None:
        """Let every engine's clock end with the stage."""

    def _at(self, when: float, what: str, worker: int, call: int = 0) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what, worker, call))

    def _look(self, worker: int, when: float) -> None:
        """See whether there is something to say; else look again when the next answer ends."""
        engine, (call, has_more) = self.engines[worker], self._calls[worker]
        if engine.results or (has_more and engine.wants):
            self._at(when + self._config.round_trip_seconds / 2, "reply", worker, call)
        elif engine.at_work:
            self._at(engine.at_work[0][0], "look", worker, call)

    def _reply(self, worker: int) -> tuple[int, Reply]:
        engine = self.engines[worker]
        del self._calls[worker]
        results, engine.results = tuple(map(Done, engine.results)), []
        return worker, Reply(
            life=str(engine.life), is_ready=True, results=results, units=len(results), num_wanted=int(engine.wants)
        )

    def _die(self, worker: int) -> tuple[int, Lost]:
        self.engines[worker].advance(self.now)
        self.engines[worker].die(back_at=self.now + self._config.restart_seconds)
        self._calls.pop(worker, None)
        self.down_seconds += self._config.restart_seconds
        self._at(self.now + self._config.restart_seconds, "back", worker)
        return worker, Lost(why="simulated")


class Silent:
    """Progress that nobody looks at."""

    def add(self, units: int, amount: int) -> None:
        """Nothing."""

    def workers(self, num_alive: int, num_workers: int) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated stage came to."""

    seconds: float
    """Simulated."""
    busy: float
    """Share of living engines' time in which they computed, until the last shard was answered."""
    slots_busy: float
    """Share of living engines' slots that computed."""
    driver_ms_per_shard: float
    """Real: giving out and taking back."""
    driver_kib: tuple[float, ...]
    """Memory of the driver's bookkeeping when a quarter and when three quarters of the shards were answered."""


def draw_tasks(config: SimulationConfig) -> Iterator[Task]:
    """Draw the shards, one by one."""
    chance, location = random.Random(config.seed), math.log(config.median_tokens)
    for index, start in enumerate(range(0, config.prompts, config.shard_size)):
        number = min(config.shard_size, config.prompts - start) * config.responses
        lengths = (round(chance.lognormvariate(location, config.sigma)) for _ in range(number))
        yield Task(index, tuple(min(max(length, 1), config.max_tokens) for length in lengths))


class Stopwatch:
    """CPU time of this thread in some pieces of a block of work."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function whose time is counted."""

        def wrapped(*arguments: Any, **settings: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **settings)
            finally:
                self.seconds += time.thread_time() - began

        return wrapped


def simulate(config: SimulationConfig, *, traces_memory: bool = False) -> Outcome:
    """Work a stage off -> Outcome. Every shard is checked to come once."""
    mean = config.median_tokens * math.exp(config.sigma**2 / 2)
    expected = config.prompts * config.responses * mean * config.step_seconds / (config.slots * config.engines)
    team = SimulatedTeam(config, random.Random(config.seed), expected_seconds=expected)
    not_ours, all_of_it = Stopwatch(), Stopwatch()
    for name in ("exchange", "replies"):
        setattr(team, name, not_ours.timed(getattr(team, name)))
    draw = not_ours.timed(partial(next, draw_tasks(config), None))
    tasks = iter(draw, None)
    num_shards = -(-config.prompts // config.shard_size)
    seen: set[int] = set()
    kib: list[float] = []
    if traces_memory:
        tracemalloc.start()
    answered = drive(team, tasks, progress=Silent())
    take = all_of_it.timed(partial(next, answered, None))
    while (pair := take()) is not None:
        task, result = pair
        assert task.index == result.index and task.index not in seen
        seen.add(task.index)
        team.spend(config.write_seconds)
        if traces_memory and len(seen) in (num_shards // 4, num_shards * 3 // 4):
            kib.append(_driver_kib())
    if traces_memory:
        tracemalloc.stop()
    assert len(seen) == num_shards
    living = config.engines * team.now - team.down_seconds
    return Outcome(
        seconds=team.now,
        busy=sum(engine.busy_seconds for engine in team.engines) / living,
        slots_busy=sum(engine.slot_seconds for engine in team.engines) / (living * config.slots),
        driver_ms_per_shard=1e3 * (all_of_it.seconds - not_ours.seconds) / num_shards,
        driver_kib=tuple(kib),
    )


def _driver_kib() -> float:
    """Measure what the pool's code holds -> KiB. The tasks themselves are allocated elsewhere."""
    kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/megatron_sppo/cluster/*")])
    return sum(line.size for line in kept.statistics("filename")) / 1024


def rows(config: SimulationConfig) -> list[Row]:
    """Run the simulation, and once more for its memory -> rows."""
    found, traced = simulate(config), simulate(config, traces_memory=True)
    row = partial(figure, "C7s")
    early, late = traced.driver_kib
    size = f"{config.engines} engines, {config.prompts:,} prompts in shards of {config.shard_size}"
    lengths = (
        f"log-normal answers (median {config.median_tokens:.0f}, sigma {config.sigma}, cut at {config.max_tokens})"
    )
    return [
        row(
            f"share of engines' time in which they compute; {size}, {config.slots} slots, {lengths}, "
            f"{config.dying:.0%} dying",
            *(found.busy, None, "", found.busy, ">= 0.95", found.busy >= 0.95),
        ),
        row(
            "share of slots that are busy, the last answers of the stage included",
            found.slots_busy,
            None,
            "",
            None,
            None,
            None,
        ),
        row(
            "driver, ms a shard without writing it (CPU)",
            *(found.driver_ms_per_shard, None, "", found.driver_ms_per_shard, "< 5 ms", found.driver_ms_per_shard < 5),
        ),
        row(
            "driver's bookkeeping at 3/4 of the stage, KiB",
            *(late, early, "at 1/4", late / early, "<= 1.1x", late <= 1.1 * early),
        ),
        row("stage, simulated seconds", found.seconds, None, "", None, None, None),
    ]


def main() -> None:
    """Simulate and write the rows."""
    config = parse(SimulationConfig, name=NAME, description=__doc__ or "")
    logging.getLogger("megatron_sppo.cluster").setLevel(logging.ERROR)  # deaths are what is simulated
    machine = config.machine or describe_cpu()
    write_results("rollout_simulation", rows(config), machine=machine, packages=("megatron-sppo",))


if __name__ == "__main__":
    run_tool(main, name=NAME)
