"""Self-play under random disturbances ends with the files of an undisturbed run, for as long as `make soak` has time.

In `make test` the same disturbances, one in each stage, are in tests/e2e/test_self_play.py.
"""

import random
from pathlib import Path

import pytest

from tests.e2e.test_self_play import CONFIG, command, environment, fingerprints, self_play, write_inputs
from tests.reliability.disturbances import DISTURBANCES, ENDINGS, live
from tests.reliability.tally import Tally

LIVES = 12
"""Disturbed lives of a round, at most; then one that is left alone."""


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_disturbed_loop_ends_with_the_files_of_an_undisturbed_one(tmp_path: Path, tally: Tally) -> None:
    expected: dict[str, str] = {}
    inputs = tmp_path / "inputs"
    for number in tally.rounds("loop"):
        dice = random.Random(number)
        if not expected:
            write_inputs(inputs, CONFIG.replace("iterations: 2", "iterations: 1"))
            (tmp_path / "whole").mkdir()
            whole = self_play(inputs, tmp_path / "whole/run")
            assert whole.returncode == 0, whole.stderr
            expected = fingerprints(tmp_path / "whole/run")
        run_dir = tmp_path / f"{number}" / "run"
        run_dir.parent.mkdir()
        for _ in range(LIVES):
            disturbance = dice.choice(DISTURBANCES)
            with tally.case("loop", f"round {number}: {disturbance}"):
                code, said = live(
                    command(inputs, run_dir), run_dir, disturbance, dice, environment=environment(), seconds=30
                )
                assert code in (0, *ENDINGS[disturbance]), f"{disturbance}: exit code {code}, {said}"
            if code == 0:
                break
        with tally.case("loop", f"round {number}: the same files"):
            last = self_play(inputs, run_dir)
            assert last.returncode == 0, last.stderr
            assert fingerprints(run_dir) == expected
