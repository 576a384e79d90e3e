"""Proves that the cost of every stage grows no faster than its prompts, and a step's not at all: by counts of function
calls, files opened, entries listed and bytes read, written and hashed, which no other load of a machine changes.

Stages run whole, as `benchmarks.scale` runs them, at 200, 400 and 800 prompts, with a sampler and a judge that answer
at once. What it does not prove: what compiled code does between two calls, and any number of seconds.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scale_rows
from benchmarks.instruments import COUNTS, CountedArray, Instruments
from benchmarks.record import in_child
from benchmarks.scale_counts import LINEAR, SHORT_SIZES, count_stages, growth
from benchmarks.scale_rows import figures_before
from benchmarks.scale_stages import STAGES

PER_STEP = [name for name, stage in STAGES.items() if stage.is_per_step]
PER_PROMPT = [name for name, stage in STAGES.items() if not stage.is_per_step]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """{stage: {count: at each size}}, taken in a process of their own: the counters stay in it for ever."""
    counted: Any = in_child(count_stages, tmp_path_factory.mktemp("scale"), start_method="fork")
    return counted


@pytest.mark.parametrize("stage", PER_PROMPT)
def test_twice_the_prompts_cost_a_stage_at_most_twice_as_much(counts: Any, stage: str) -> None:
    grown = {count: growth(values, SHORT_SIZES, count) for count, values in counts[stage].items()}
    assert max(counts[stage]["calls"]) > SHORT_SIZES[0] / 10  # it was the stage that was counted, not an empty one
    assert {count: value for count, value in grown.items() if value > LINEAR} == {}, counts[stage]


@pytest.mark.parametrize("stage", PER_STEP)
def test_a_step_costs_the_same_whatever_the_size_of_the_dataset(counts: Any, stage: str) -> None:
    assert max(counts[stage]["calls"]) > 10
    for count, values in counts[stage].items():
        assert values[-1] <= 1.1 * min(values[:-1]) + 4096 * count.startswith("bytes") + 8, (count, values)


def _calls(size: int, _: Path) -> None:
    for _ in range(size):
        _nothing()


def _nothing() -> None:
    pass


def _opens(size: int, directory: Path) -> None:
    (directory / "file").touch()
    for _ in range(size):
        open(directory / "file").close()


def _entries(size: int, directory: Path) -> None:
    for number in range(8):
        (directory / str(number)).touch()
    for _ in range(size):
        list(directory.glob("*.json"))


def _bytes_read(size: int, directory: Path) -> None:
    (directory / "file").write_bytes(b"x" * 1000)
    for _ in range(size):
        (directory / "file").read_bytes()


def _bytes_written(size: int, directory: Path) -> None:
    with open(directory / "file", "wb", buffering=0) as file:
        for _ in range(size):
            file.write(b"x" * 1000)


def _bytes_hashed(size: int, directory: Path) -> None:
    digests = (hashlib.sha256(), hashlib.new("sha256"))
    for number in range(size):
        digests[number % 2].update(b"x" * 1000)
    (directory / "file").write_bytes(b"x" * 1000)
    with open(directory / "file", "rb") as file:
        hashlib.file_digest(file, "sha256")


WORK = (_calls, _opens, _entries, _bytes_read, _bytes_written, _bytes_hashed)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """{count: its growth by work of SIZE pieces, and of SIZE^2}."""
    measured: Any = in_child(_grow, tmp_path_factory.mktemp("work"), start_method="fork")
    return measured


@pytest.mark.parametrize("count", [work.__name__[1:] for work in WORK])
def test_the_instruments_see_work_that_grows_with_the_square_and_pass_what_is_linear(grown: Any, count: str) -> None:
    linear, squared = grown[count]
    assert linear <= LINEAR
    assert squared > 1.5


def test_forked_children_are_counted_with_their_parent(grown: Any) -> None:
    hashed, written = grown["forked"]
    assert hashed == 1_000_000
    assert written >= 1_000_000


def _grow(directory: Path) -> dict[str, tuple[float, float]]:
    """Count each kind of work, of SIZE and of SIZE^2 pieces, at three sizes -> `grown`, with `_fork`'s."""
    sizes, found = (50, 100, 200), {}
    for work in WORK:
        count, grows = work.__name__[1:], []
        for power in (1, 2):
            values = []
            for size in sizes:
                costs = Instruments(functions_of=Path(__file__).parent)
                with costs:
                    work(size**power, directory)
                values.append(float(getattr(costs.total, count)))
            grows.append(growth(values, sizes, count))
        found[count] = (grows[0], grows[1])
    return found | {"forked": _fork(directory)}


def _fork(directory: Path) -> tuple[float, float]:
    """Hash and write a megabyte in a forked child -> bytes hashed and written, as counted here."""
    costs = Instruments()
    with costs:
        child = os.fork()
        if child == 0:
            hashlib.sha256(b"x" * 1_000_000)
            (directory / "forked").write_bytes(b"x" * 1_000_000)
            os._exit(0)
        os.waitpid(child, 0)
    return costs.total.bytes_hashed, costs.total.bytes_written


def test_arrays_count_what_is_added_and_looked_up() -> None:
    array = np.arange(1000).view(CountedArray)
    CountedArray.touched = 0
    few = array[[1, 2, 3]]
    assert CountedArray.touched == 3
    _ = few + few
    assert CountedArray.touched == 9
    _ = (array + array)[few]
    assert CountedArray.touched == 9 + 2000 + 3
    _ = np.flatnonzero(array)
    assert CountedArray.touched >= 2012 + 1000


@pytest.mark.parametrize(("power", "grown"), [(1, 1.0), (2, 2.0)])
def test_what_grows_only_at_large_sizes_is_a_row_that_misses_its_target(
    monkeypatch: pytest.MonkeyPatch, power: int, grown: float
) -> None:
    """(400^2 - 200^2) / (200^2 - 100^2) is 4, a linear count's 2: twice as much."""
    monkeypatch.setattr(scale_rows, "sizes_of", lambda _: (100, 200, 400))
    monkeypatch.setattr(scale_rows, "counted_sizes", lambda _: (1, 2, 4))
    zeros = dict.fromkeys((*COUNTS, "cpu_seconds", "peak_bytes"), 0.0)
    found = {f"counts {size}": zeros | {"opens": 1000.0 * size} for size in (1, 2, 4)}
    found |= {str(size): zeros | {"bytes_read": 1e6 * size**power} for size in (100, 200, 400)}
    before = {"merge: growth of its counts, the worst (calls); 1 is linear, or none": 3.0}
    rows = {row.metric: row for row in scale_rows.rows_of({"merge": found}, before)}
    small = rows["merge: growth of its counts, the worst (calls); 1 is linear, or none"]
    large = next(row for metric, row in rows.items() if metric.startswith("merge: growth of its counts up to 400"))
    assert (small.ours, small.peer, small.met) == (1.0, 3.0, True)
    assert (large.ours, large.met) == (pytest.approx(grown), grown <= 1.1)
    assert figures_before({"rows": [small.__dict__, large.__dict__]}) == before
