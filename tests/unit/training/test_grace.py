"""Proves what is said of a save that may not be whole before a run is ended, and where the time for it comes from.

That the save is whole or absent however it ends is proved in tests/e2e.
"""

import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sppo.command_line import default_grace_seconds
from megatron_sppo.training import grace
from megatron_sppo.training.grace import Grace
from megatron_sppo.training.stopping import StopRequest

GB = 10**9


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    request = StopRequest()
    yield request
    request.restore()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that takes 1 GB a second -> the bytes of each trial."""
    trials: list[int] = []
    monkeypatch.setattr(grace, "_write_seconds", lambda _, num_bytes: trials.append(num_bytes) or num_bytes / GB)
    return trials


def test_a_checkpoint_that_takes_longer_than_the_grace_is_said_at_start_with_what_to_ask_for(
    tmp_path: Path, disk: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """90 GB at 1 GB/s are 90 s; twice that in whole minutes are 180."""
    Grace(tmp_path, num_bytes=90 * GB, grace_seconds=120)
    assert caplog.messages == []
    Grace(tmp_path, num_bytes=90 * GB, grace_seconds=60)
    (said,) = caplog.messages
    assert "a checkpoint of 90 GB takes about 90 s or more, by a trial of this disk, --grace-seconds is 60" in said
    assert "--signal=TERM@180 with --grace-seconds 180" in said
    assert disk == [64 << 20] * 2


def test_torchrun_ends_its_ranks_sooner_than_the_grace_unless_it_is_told(
    tmp_path: Path,
    disk: list[int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    stop: StopRequest,
) -> None:
    """50 GB at 1 GB/s; torchrun's own 30 s count, not the 120 that there would be."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    Grace(tmp_path, num_bytes=50 * GB, grace_seconds=120).warn_at_signal(stop)
    at_start, at_signal = caplog.messages
    assert "about 50 s or more, by a trial of this disk, torchrun ends its ranks 30 s after SIGTERM: one" in at_start
    assert "Use export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 before torchrun, and --save-interval" in at_start
    assert "30 s are left" in at_signal
    caplog.clear()
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    Grace(tmp_path, num_bytes=50 * GB, grace_seconds=120).warn_at_signal(stop)
    assert caplog.messages == []
    Grace(tmp_path, num_bytes=150 * GB, grace_seconds=120)
    assert "--grace-seconds is 120: one" in caplog.messages[0] and "TORCH_ELASTIC" not in caplog.messages[0]


def test_ranks_share_the_checkpoint_and_a_small_one_has_a_small_trial(
    tmp_path: Path, disk: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    Grace(tmp_path, num_bytes=400 * GB, grace_seconds=120)  # 100 s
    Grace(tmp_path, num_bytes=4000, grace_seconds=120)
    assert caplog.messages == [] and disk == [64 << 20, 1000]


def test_what_a_save_took_is_what_counts_from_then_on(
    tmp_path: Path, disk: list[int], caplog: pytest.LogCaptureFixture, stop: StopRequest
) -> None:
    measured = Grace(tmp_path, num_bytes=10 * GB, grace_seconds=60)
    measured.note(20.0)
    measured.warn_at_signal(stop)
    assert caplog.messages == []
    for seconds in (80.0, 30.0, 90.0):  # once is enough
        measured.note(seconds)
    assert len(caplog.messages) == 1
    assert "a checkpoint of 10 GB took about 80 s, --grace-seconds is 60" in caplog.messages[0]
    measured.warn_at_signal(stop)
    assert "begins now takes about 90 s, and 60 s are left" in caplog.messages[1]


def test_time_that_has_gone_since_the_signal_and_the_end_of_the_job_count(
    tmp_path: Path,
    disk: list[int],
    caplog: pytest.LogCaptureFixture,
    stop: StopRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimated = Grace(tmp_path, num_bytes=50 * GB, grace_seconds=60)
    signal.raise_signal(signal.SIGTERM)
    assert stop.asked and stop.asked_at is not None
    estimated.warn_at_signal(stop)
    assert caplog.messages == []  # 50 of 60 s
    stop.asked_at -= 20
    estimated.warn_at_signal(stop)
    assert "takes about 50 s, and 40 s are left" in caplog.messages[0]
    stop.asked_at += 20
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 5))
    estimated.warn_at_signal(stop)
    assert "takes about 50 s, and 0 s are left" in caplog.messages[1]


def test_a_trial_leaves_nothing_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Grace(tmp_path, num_bytes=3 << 20, grace_seconds=1e-9)
    assert list(tmp_path.iterdir()) == [] and len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 30),
        ({"SLURM_JOB_ID": "7"}, 120),
        ({"SLURM_JOB_ID": "7", "SBATCH_SIGNAL": "TERM@300"}, 300),
        ({"SLURM_JOB_ID": "7", "SBATCH_SIGNAL": "B:SIGTERM@90"}, 90),
        ({"SLURM_JOB_ID": "7", "SBATCH_SIGNAL": "RB:15@600"}, 600),
        ({"SLURM_JOB_ID": "7", "SBATCH_SIGNAL": "USR1@600"}, 120),
        ({"SLURM_JOB_ID": "7", "SBATCH_SIGNAL": "TERM"}, 120),
    ],
)
def test_the_default_is_what_slurm_was_asked_for(
    environment: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_SIGNAL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_grace_seconds() == seconds
