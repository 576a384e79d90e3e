"""Proves by simulated engines that the pool's driver keeps them at work, costs little and grows with nothing.

A tenth of benchmarks/rollout_simulation.py: the same prompts for each engine. Time in engines is made up; the driver's
own is real CPU time.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.rollout_simulation import Engine, SimulationConfig, Task, simulate

TENTH = SimulationConfig(engines=60, prompts=6000)


@pytest.fixture(autouse=True)
def _deaths_are_no_news() -> Iterator[None]:
    logger = logging.getLogger("megatron_sppo.cluster")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def test_engines_compute_95_of_100_seconds_and_the_driver_s_memory_stays() -> None:
    found = simulate(TENTH, traces_memory=True)  # every shard comes once, or it fails
    assert found.busy >= 0.95
    assert found.driver_ms_per_shard < 5
    early, late = found.driver_kib
    assert late <= 1.1 * early


def test_an_engine_that_waits_for_each_shard_s_end_would_be_idle_more() -> None:
    """With one shard at a time an engine's slots run empty at each border: the simulation shows it."""
    streaming = simulate(replace(TENTH, prompts=1200))

    class Draining(Engine):
        @property
        def wants(self) -> bool:
            return not self.num_unfinished

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.rollout_simulation.Engine", Draining)
        draining = simulate(replace(TENTH, prompts=1200))
    assert draining.slots_busy < 0.8 * streaming.slots_busy


def test_deaths_of_half_of_all_engines_lose_nothing() -> None:
    simulate(replace(TENTH, prompts=1200, dying=0.5, restart_seconds=5.0))


def test_a_simulated_engine_takes_as_long_as_its_answers_by_arithmetic() -> None:
    engine = Engine(slots=2, step_seconds=1.0)
    engine.take(Task(0, (3, 5, 4)))  # two at once: ends at 3 and 5; the third begins at 3 and ends at 7
    engine.advance(6.0)
    assert engine.results == [] and engine.num_unfinished == 1
    engine.advance(10.0)
    assert engine.results == [0]
    assert (engine.busy_seconds, engine.slot_seconds) == (7.0, 12.0)
