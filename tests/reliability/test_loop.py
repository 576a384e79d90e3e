"""Self-play under random disturbances ends with the files of an undisturbed run, for as long as `make soak` has time.

The judge is a server on the loopback, slow and unwilling at times. In `make test` the other disturbances, one in each
stage, are in tests/e2e/test_self_play.py.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_self_play import CONFIG, command, environment, fingerprints, self_play, write_inputs
from tests.reliability.disturbances import DISTURBANCES, ENDINGS, live
from tests.reliability.tally import Tally
from tests.unit.judge.judge_server import Answer, longer_wins, running_server

LIVES = 12
"""Disturbed lives of a round, at most; then one that is left alone."""


def unwilling(dice: random.Random) -> Callable[[dict[str, Any]], Answer]:
    """Make a judge that is away at first, then keeps everyone waiting and sends some away -> its answers."""
    back = time.monotonic() + 3

    def answer(body: dict[str, Any]) -> Answer:
        time.sleep(dice.random() * 0.3)
        if time.monotonic() < back or dice.random() < 0.1:
            return 503, {"error": "busy"}, {"Retry-After": "1"}
        return longer_wins(body)

    return answer


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_disturbed_loop_ends_with_the_files_of_an_undisturbed_one(
    tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPPO_ENDPOINT_CACHE", "")  # or the undisturbed run would have asked all questions
    inputs, whole = tmp_path / "inputs", tmp_path / "whole/run"
    with running_server() as server:
        judge = f"judge: 'endpoint:{server.url}#judge'"
        config = CONFIG.replace("iterations: 2", "iterations: 1").replace("judge: rules:concise", judge)
        assert judge in config
        inputs.mkdir()
        write_inputs(inputs, config)
        whole.parent.mkdir()
        undisturbed = self_play(inputs, whole)
        assert undisturbed.returncode == 0, undisturbed.stderr
        assert len(server.bodies) > 50
        expected = fingerprints(whole)
        for number in tally.rounds("loop"):
            dice = random.Random(number)
            run_dir = tmp_path / f"{number}" / "run"
            run_dir.parent.mkdir()
            for life in range(LIVES):
                disturbance, is_slow = dice.choice(DISTURBANCES), life == 0 or dice.random() < 0.5
                server.answer = unwilling(dice) if is_slow else longer_wins
                with tally.case("loop", f"round {number}: {disturbance}{', slow server' * is_slow}"):
                    code, said = live(
                        command(inputs, run_dir), run_dir, disturbance, dice, environment=environment(), seconds=30
                    )
                    assert code in (0, *ENDINGS[disturbance]), f"{disturbance}: exit code {code}, {said}"
                if code == 0:
                    break
            server.answer = longer_wins
            with tally.case("loop", f"round {number}: the same files"):
                last = self_play(inputs, run_dir)
                assert last.returncode == 0, last.stderr
                assert fingerprints(run_dir) == expected
