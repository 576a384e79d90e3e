"""The tally counts what was tried and what passed, whoever tries it; the table of `make soak` misses no kind."""

import json
from pathlib import Path

import pytest

from benchmarks.soak import GOALS, MEANING, replace_cases, rows_of
from tests.reliability.tally import KINDS, Tally


def test_a_case_that_fails_is_counted_as_failed_and_the_test_hears_of_it(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "cases.jsonl", soak=False, until=0)
    with tally.case("kills", "good"):
        pass
    with pytest.raises(OSError, match="gone"), tally.case("kills", "bad"):
        raise OSError("gone")
    counted = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [(case["kind"], case["name"], case["passed"]) for case in counted] == [
        ("kills", "good", True),
        ("kills", "bad", False),
    ]


def test_a_soak_tries_all_cases_and_a_run_of_the_tests_the_first_few() -> None:
    assert list(Tally(None, soak=False, until=0).cases("flips", 2, 600)) == [0, 1]
    assert list(Tally(None, soak=True, until=0).cases("flips", 2, 600)) == list(range(600))
    assert list(Tally(None, soak=True, until=0).rounds("loop")) == [0]


def test_a_marked_test_is_one_case_of_its_kind(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    (tmp_path / "test_marked.py").write_text(
        "import pytest\n"
        "@pytest.mark.counts('bad inputs')\n"
        "@pytest.mark.parametrize('number', [1, 2, 3])\n"
        "def test_marked(number):\n"
        "    assert number != 2\n"
        "def test_other():\n"
        "    pass\n"
    )
    plugin = ["-p", "tests.reliability.tally", "--tally", str(tmp_path / "cases.jsonl"), "-m", "reliability"]
    assert pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *plugin, str(tmp_path)]) == 1
    counted = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [(case["kind"], case["passed"]) for case in counted] == [
        ("bad inputs", True),
        ("bad inputs", False),
        ("bad inputs", True),
    ]


def test_the_table_has_a_row_for_every_kind_and_too_few_cases_do_not_meet_a_goal(tmp_path: Path) -> None:
    assert set(MEANING) == set(KINDS) and set(GOALS) <= set(KINDS)
    tally = Tally(tmp_path / "cases.jsonl", soak=True, until=0)
    for number in range(GOALS["pickles"] - 1):
        tally.add("pickles", f"{number}", passed=True, seconds=0.0)
    tally.add("loop", "0", passed=False, seconds=0.0)
    tally.add("hangs", "0", passed=True, seconds=0.0)
    met = {row.metric.partition(":")[0]: row.met for row in rows_of(tmp_path / "cases.jsonl")}
    assert list(met) == list(KINDS)
    assert not met["pickles"] and not met["loop"] and not met["kills"] and met["hangs"]
    tally.add("pickles", "last", passed=True, seconds=0.0)
    assert {row.metric.partition(":")[0]: row.met for row in rows_of(tmp_path / "cases.jsonl")}["pickles"]


def test_tests_that_run_again_take_the_place_of_their_own_cases_alone(tmp_path: Path) -> None:
    def written(name: str, *cases: tuple[str, str, bool]) -> Path:
        keys = ("kind", "test", "passed")
        (tmp_path / name).write_text("".join(json.dumps(dict(zip(keys, case, strict=True))) + "\n" for case in cases))
        return tmp_path / name

    old = written("old", ("kills", "a", False), ("kills", "b", True), ("kills", "a", True))
    replace_cases(old, written("new", ("kills", "a", True), ("flips", "c", False)))
    counted = {row.metric.partition(":")[0]: (row.ours, row.peer) for row in rows_of(old)}
    assert (counted["kills"], counted["flips"]) == ((2, 2), (0, 1))


def test_a_case_says_its_test(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    Tally(tmp_path / "cases.jsonl", soak=False, until=0).add("kills", "good", passed=True, seconds=0.0)
    assert json.loads((tmp_path / "cases.jsonl").read_text())["test"] == request.node.nodeid
