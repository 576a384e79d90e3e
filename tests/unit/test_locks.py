"""Proves that an output directory has one writer: a second is told who has it, and the lock of a dead one is taken."""

import os
import socket
import subprocess
import sys
import time

import pytest

from megatron_sppo import locks
from megatron_sppo.errors import ConfigError, DataError

HOLD = """
import pathlib, sys, time
from megatron_sppo import locks
with locks.locked(pathlib.Path(sys.argv[1]), flag="--save"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_dead_one_s_lock_is_taken_and_said(tmp_path, caplog):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        words = f"in use by process {holder.pid} on {socket.gethostname()}.*another directory with --save"
        with pytest.raises(ConfigError, match=words), locks.locked(tmp_path, flag="--save"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locks.locked(tmp_path, flag="--save"):
        assert f"was left by process {holder.pid}" in caplog.text
        assert (tmp_path / ".lock").read_text().split() == [socket.gethostname(), str(os.getpid())]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_host_counts_while_it_is_touched(tmp_path, caplog):
    """A network file system need not carry the kernel's lock: then the text and the time of the file decide."""
    lock = tmp_path / ".lock"
    lock.write_text("node17 4242\n")
    refusal = pytest.raises(ConfigError, match=rf"process 4242 on node17.*If it is gone, wait 120 s or remove {lock}")
    with refusal, locks.locked(tmp_path, flag="--save"):
        pass
    assert lock.read_text() == "node17 4242\n"
    long_ago = lock.stat().st_mtime - locks.LOCK_STALE_SECONDS - 1
    os.utime(lock, (long_ago, long_ago))
    with locks.locked(tmp_path, flag="--save"):
        assert "left by process 4242 on node17" in caplog.text


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LOCK_BEAT_SECONDS", 0.01)
    with locks.locked(tmp_path, flag="--save"):
        os.utime(tmp_path / ".lock", (0, 0))
        for _ in range(500):
            if (tmp_path / ".lock").stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert (tmp_path / ".lock").stat().st_mtime > 0


def test_a_lock_for_the_process_is_taken_once(tmp_path):
    locks.lock_until_exit(tmp_path, flag="--save")
    locks.lock_until_exit(tmp_path, flag="--save")
    holder = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
    assert f"in use by process {os.getpid()}" in holder.stderr


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_that_is_a_link_to_another_file_is_refused_and_that_file_stays(tmp_path, link):
    """A directory that a stranger has packed may hold one to any file of the user's."""
    diary = tmp_path / "diary.txt"
    diary.write_text("dear")
    (tmp_path / "run").mkdir()
    link(diary, tmp_path / "run/.lock")
    with pytest.raises(DataError, match="written into"), locks.locked(tmp_path / "run", flag="--save"):
        pass
    assert diary.read_text() == "dear"
