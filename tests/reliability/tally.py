"""How many cases of each kind a run of the tests tries, and what became of each: the table of `make soak`.

A test asks the fixture `tally` for its case numbers, few in `make test` and all of them under --soak, and holds each
case within `tally.case`. A parametrised test that is one case each has the mark `counts(KIND)`. With --tally FILE every
case adds a line {"kind", "name", "passed", "seconds", "test"} to the file, which workers of xdist share: lines are
whole.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KINDS = (
    "kills",
    "signals",
    "writes",
    "full disk",
    "flips",
    "trackers",
    "bad inputs",
    "pickles",
    "injections",
    "numbers",
    "hangs",
    "loop",
)
"""Rows of the table, in its order."""

_BEGUN = time.monotonic()


class Tally:
    """Counts the cases of one test."""

    def __init__(self, file: Path | None, *, soak: bool, until: float) -> None:
        self._file, self._soak, self._until = file, soak, until

    def cases(self, kind: str, quick: int, whole: int) -> range:
        """Choose the case numbers of this run -> the first `quick`, or all `whole` of them under --soak.

        A case is made from its number alone (`random.Random(number)`), so that one that failed can be run again.
        """
        assert kind in KINDS and quick <= whole
        return range(whole if self._soak else quick)

    def rounds(self, kind: str) -> Iterator[int]:
        """Count rounds -> 0, 1, ...: one, and under --soak more until --soak-minutes are over."""
        assert kind in KINDS
        number = 0
        while number < 1 or (self._soak and time.monotonic() < self._until):
            yield number
            number += 1

    @contextlib.contextmanager
    def case(self, kind: str, name: str) -> Iterator[None]:
        """Count the block as one case: passed if it ends without an error, which goes on to the test."""
        begin, passed = time.monotonic(), False
        try:
            yield
            passed = True
        finally:
            self.add(kind, name, passed=passed, seconds=time.monotonic() - begin)

    @contextlib.contextmanager
    def together(self, kind: str) -> Iterator[list[str]]:
        """Count as many cases as names are put into the list: all passed if the block ends without an error."""
        names: list[str] = []
        begin, passed = time.monotonic(), False
        try:
            yield names
            passed = True
        finally:
            for name in names:
                self.add(kind, name, passed=passed, seconds=(time.monotonic() - begin) / len(names))

    def add(self, kind: str, name: str, *, passed: bool, seconds: float) -> None:
        """Count a case whose end is known."""
        assert kind in KINDS, f"{kind!r} is none of {KINDS}"
        if self._file is not None:
            # "PATH::TEST (call)", as pytest says itself.
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
            line = {"kind": kind, "name": name, "passed": passed, "seconds": round(seconds, 3), "test": test}
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, f"{json.dumps(line)}\n".encode())
            finally:
                os.close(descriptor)


def _tally_of(config: pytest.Config) -> Tally:
    file, minutes = config.getoption("--tally"), config.getoption("--soak-minutes")
    return Tally(file and Path(file).resolve(), soak=config.getoption("--soak"), until=_BEGUN + 60 * minutes)


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    """Says which cases this run tries, and counts them."""
    return _tally_of(pytestconfig)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="try every case of the reliability tests (make soak)")
    parser.addoption("--soak-minutes", type=float, default=0.0, help="how long the loop goes on under --soak")
    parser.addoption("--tally", metavar="FILE", help="add a line to FILE for every case of the reliability tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "counts(kind): one case of that kind in the table of `make soak`")
    config.addinivalue_line("markers", "soak: runs under --soak alone")
    config.addinivalue_line("markers", "reliability: has cases for that table; set from the fixture and the mark")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by the mark
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak") and (left := [item for item in items if item.get_closest_marker("soak")]):
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    for item in items:
        if "tally" in getattr(item, "fixturenames", ()) or item.get_closest_marker("counts"):
            item.add_marker(pytest.mark.reliability)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    report: Any = yield
    mark = item.get_closest_marker("counts")
    if mark is not None and (report.when == "call" or (report.when == "setup" and not report.passed)):
        _tally_of(item.config).add(mark.args[0], item.nodeid, passed=report.passed, seconds=report.duration)
    return report
