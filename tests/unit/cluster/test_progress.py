"""Proves what a stage says of itself: the line's numbers, and the file that another terminal reads."""

import math

import pytest

from megatron_sppo.cluster.progress import StageProgress, clock_time, progress_file, read_progress
from megatron_sppo.errors import DataError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def begin(output, clock, done=0):
    names = {"stage": "rollouts", "unit": "prompts", "amount_unit": "tokens"}
    return StageProgress(progress_file(output), **names, total=100, done=done, clock=clock)


def test_rate_and_time_left_are_those_of_this_run(tmp_path):
    clock = Clock()
    with begin(tmp_path / "out", clock, done=40) as progress:
        progress.workers(2, 3)
        clock.now += 10
        progress.add(20, 5000)
        numbers = read_progress(tmp_path / "out")
        # 20 prompts in 10 s leave 40, which is 20 s; 5000 tokens in 10 s are 500 a second.
        assert (numbers.done, numbers.total, numbers.per_second, numbers.seconds_left) == (60, 100, 500, 20)
        assert numbers.line() == "rollouts: 60 of 100 prompts, 500 tokens/s, 2 of 3 workers alive, 0:20 left"
    assert read_progress(tmp_path / "out") is None


def test_the_file_of_a_stage_that_failed_stays(tmp_path):
    with pytest.raises(RuntimeError), begin(tmp_path / "out", Clock()) as progress:
        progress.add(7, 70)
        raise RuntimeError
    assert read_progress(tmp_path / "out").done == 7


def test_the_file_is_written_now_and_then_not_at_every_report(tmp_path, monkeypatch):
    clock, written = Clock(), []
    monkeypatch.setattr("megatron_sppo.cluster.progress.write_json", lambda path, value: written.append(value))
    with begin(tmp_path / "out", clock) as progress:
        for _ in range(100):
            clock.now += 0.1
            progress.add(1, 10)
    assert len(written) <= 7  # 10 s


def test_a_log_gets_a_line_a_minute(tmp_path, caplog):
    caplog.set_level("INFO")
    clock = Clock()
    with begin(tmp_path / "out", clock) as progress:
        for _ in range(10):
            clock.now += 15
            progress.add(1, 10)
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "rollouts: 4 of 100 prompts",
        "rollouts: 8 of 100 prompts",
    ]


def test_a_damaged_file_is_named(tmp_path):
    progress_file(tmp_path / "out").write_text('{"stage": 1}')
    with pytest.raises(DataError, match=r"\.out\.progress\.json.*Remove it"):
        read_progress(tmp_path / "out")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7265, "2:01:05"), (-5, "0:00"), (float("nan"), "0:00")],
)
def test_durations_are_spelled_as_clocks_do(seconds, text):
    assert clock_time(seconds) == text
    assert clock_time(math.inf) == clock_time(1e300) == "359999:59:59"
