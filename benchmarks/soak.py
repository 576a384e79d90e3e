"""The table of reliability: every fault that the tests know how to make, each case counted.

    python -m benchmarks.soak                    # an hour; make soak SOAK_MINUTES=60
    python -m benchmarks.soak --cases FILE --only tests/reliability/test_hangs.py     # after a fault was mended

All tests that count cases (tests/reliability/tally.py) run with all of their cases, whatever they take. What is then
left of the time goes to self-play under random faults. A kind is met where its goal was tried and every case passed;
exit code 1 where one is not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import RESULTS, Row, describe_cpu, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import PositiveFloat, check_ranges, parse
from megatron_sppo.errors import ConfigError
from tests.reliability.tally import KINDS

NAME = "soak.py"
LOOP = "tests/reliability/test_loop.py"
GOALS = {"kills": 200, "signals": 200, "bad inputs": 400, "flips": 600, "pickles": 25, "injections": 100}
"""Least number of cases, where one was set. Of other kinds there are as many as there are places to fail."""
MEANING = {
    "kills": "kill -9 at random points, half of them in saves",
    "signals": "SIGTERM, SIGINT and SIGHUP at random points of every stage",
    "writes": "every write, fsync, rename, unlink of every writer failed, torn or its last, once each",
    "full disk": "disk full, read-only or out of files, from every write on",
    "flips": "one flipped bit in any kind of file",
    "trackers": "trackers empty, garbage or ahead",
    "bad inputs": "malformed checkpoints, datasets, prompts, configurations, replies",
    "pickles": "pickles and code in any file that is read",
    "injections": "markers of judges and templates, scripts, paths and links in texts and names",
    "numbers": "NaN, Inf, spikes, corrupted ranks",
    "hangs": "hung, dead or slow ranks, engines, servers",
    "loop": "self-play under random faults: the same files as an undisturbed run",
}


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """How long, and where the cases are written."""

    minutes: PositiveFloat = 60.0
    """Of all; the loop gets what the other cases leave, and at least one round."""
    machine: str | None = None
    """Folder under benchmarks/results; unset: named after the processor."""
    cases: Path | None = None
    """File for a JSON line a case; unset: they are not kept."""
    only: tuple[str, ...] = ()
    """Tests to run alone, as pytest names them. What they count takes the place of what the same tests counted before
    in --cases; the rest of it stays."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.only and (self.cases is None or not self.cases.is_file()):
            raise ConfigError("--only goes on with the cases of a soak. Name their file: --cases FILE")


def run_tests(paths: list[str], *options: str, cases: Path) -> bool:
    """Run the tests that count -> whether all passed."""
    repository = RESULTS.parents[1]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    # A test has many more cases here than its time limit is for.
    flags = ["-q", "-m", "reliability", "--soak", "--tally", str(cases), "--timeout", "5400", *options]
    command = [sys.executable, "-m", "pytest", *flags, *paths]
    return subprocess.run(command, cwd=repository, env={**os.environ, **quiet}).returncode == 0


def replace_cases(cases: Path, new: Path) -> None:
    """Put the cases of tests that ran again in the place of their old ones."""
    again = [json.loads(line) for line in new.read_text(encoding="utf-8").splitlines()]
    tests = {case["test"] for case in again}
    kept = [
        case for case in map(json.loads, cases.read_text(encoding="utf-8").splitlines()) if case["test"] not in tests
    ]
    cases.write_text("".join(f"{json.dumps(case)}\n" for case in (*kept, *again)), encoding="utf-8")


def rows_of(cases: Path) -> list[Row]:
    """Count the cases of each kind -> a row each, also of kinds that were not tried."""
    passed: dict[str, list[bool]] = defaultdict(list)
    for line in cases.read_text(encoding="utf-8").splitlines() if cases.exists() else ():
        case = json.loads(line)
        passed[case["kind"]].append(case["passed"])
    rows = []
    for kind in KINDS:
        tried, goal = len(passed[kind]), GOALS.get(kind, 1)
        row = Row(
            id="R",
            metric=f"{kind}: {MEANING[kind]}",
            ours=sum(passed[kind]),
            peer=tried,
            peer_name="tried",
            ratio=sum(passed[kind]) / tried if tried else None,
            target=f">= {goal} tried, all pass" if kind in GOALS else "all pass",
            met=tried >= goal and all(passed[kind]),
        )
        rows.append(row)
    return rows


def main() -> None:
    """Try everything and write the table; exit code 1 where a kind does not meet its goal."""
    config = parse(SoakConfig, name=NAME, description=__doc__ or "")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        cases = (config.cases or Path(scratch, "cases.jsonl")).resolve()
        if config.only:
            new = Path(scratch, "new.jsonl")
            good = run_tests(list(config.only), "--soak-minutes", f"{config.minutes}", cases=new)
            replace_cases(cases, new)
        else:
            cases.unlink(missing_ok=True)
            two_at_a_time = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
            good = run_tests(["tests"], f"--ignore={LOOP}", *two_at_a_time, cases=cases)
            left = config.minutes - (time.monotonic() - begin) / 60
            good = run_tests([LOOP], "--soak-minutes", f"{max(left, 0):.2f}", cases=cases) and good
        rows = rows_of(cases)
    write_results("soak", rows, machine=config.machine or describe_cpu(), packages=("torch", "megatron-core"))
    if not good or not all(row.met for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main, name=NAME)
