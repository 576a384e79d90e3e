"""A stage's process: its own session, its output in a log, its progress bar on the terminal, and never an orphan.

On Linux a stage is told to end when its loop dies (PR_SET_PDEATHSIG); what is left of it nevertheless, the next command
on the same run directory ends before it starts anything.
"""

import contextlib
import fcntl
import functools
import math
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from megatron_sppo.cluster.kept import ADDRESS_VARIABLE
from megatron_sppo.command_line import TORCHRUN_GRACE_VARIABLE, death_with_parent
from megatron_sppo.storage import refuse_link

_TAIL_BYTES = 1 << 16
_KEPT_GRACE_SECONDS = 5.0
"""It has nothing to save."""
_ERROR_LINE = re.compile(r"^(?:\[[^\]]*\]:?\s*)?([\w.-]+(?: [\w-]+)?: error: .+)$")
_EXCEPTION_LINE = re.compile(r"^(?:\[[^\]]*\]:?\s*)?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)$")
_TORCHRUN_EXIT_CODE = re.compile(r"exitcode\s*:\s*(-?\d+)|SignalException: Process \d+ got signal: (\d+)")


class Interrupted(BaseException):
    """SIGTERM or SIGINT reached the loop. Not an Exception: nothing may take it for a stage's failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the block at the first SIGTERM or SIGINT; later ones are ignored while it winds up."""

    def on_signal(signum: int, _frame: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted(signum)

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, action in old.items():
            signal.signal(number, action)


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """A process that a later command can recognise: a bare pid may be another's by then."""

    pid: int
    start_time: str
    """Clock ticks since boot, from /proc/PID/stat; empty where there is no /proc."""
    namespace: str
    """Boot and pid namespace that the pid belongs to."""


def identity_of(pid: int) -> ProcessIdentity:
    """Describe a living process -> ProcessIdentity."""
    return ProcessIdentity(pid=pid, start_time=_start_time(pid), namespace=_namespace())


def lives(identity: ProcessIdentity) -> bool | None:
    """Tell whether a process that was described still lives -> None where another machine would have to say."""
    if identity.namespace != _namespace():
        return None
    return _group_lives(identity.pid) and _start_time(identity.pid) in ("", identity.start_time)


def run_logged(command: Sequence[str], log_path: Path, *, on_start: Callable[[int], None], grace_seconds: float) -> int:
    """Run a command to its end, its output appended to `log_path` -> exit status.

    On a terminal the line that the command rewrites in place (a progress bar) is shown too. On `Interrupted` the
    command is ended first: SIGTERM, SIGKILL after the grace, which torchrun is told of: it would take 30 s.

    Args:
        on_start: called with the process's id as soon as it runs.
        grace_seconds: between SIGTERM and SIGKILL; training saves a checkpoint in it.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    refuse_link(log_path)
    with open(log_path, "ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        master, slave = _open_terminal() if sys.stderr.isatty() else (None, None)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if slave is None else slave,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={TORCHRUN_GRACE_VARIABLE: str(math.ceil(grace_seconds)), **os.environ},
                preexec_fn=functools.partial(_end_with_parent, os.getpid(), death_with_parent(signal.SIGTERM)),
            )
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            reason = "does not exist" if is_missing else f"cannot be started ({error.strerror})"
            log.write(f"self_play: error: {error.filename or command[0]} {reason}.\n".encode())
            return 2
        finally:
            if slave is not None:
                os.close(slave)
        try:
            on_start(process.pid)
            if master is not None:
                _relay(master, log, sys.stderr, process)
            return process.wait()
        except BaseException:
            _stop(process, grace_seconds=grace_seconds)
            raise
        finally:
            _kill_group(process.pid, signal.SIGKILL)  # what the command itself left behind
            if master is not None:
                os.close(master)


@contextlib.contextmanager
def kept_process(log_path: Path, *, on_start: Callable[[int], None]) -> Iterator[None]:
    """Keep a process for the workers of the stages that are run in the block (`cluster.kept`); it ends with the block.

    Args:
        log_path: its stdout and stderr are appended there.
        on_start: called with its id as soon as it runs.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    refuse_link(log_path)
    # Its socket cannot lie in the run's directory: a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="megatron-sppo-") as directory, open(log_path, "ab") as log:
        address = str(Path(directory, "kept"))
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_sppo.cluster.kept", address],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=functools.partial(_end_with_parent, os.getpid(), death_with_parent(signal.SIGTERM)),
        )
        try:
            on_start(process.pid)
            while not Path(address).exists() and process.poll() is None:
                time.sleep(0.02)
            os.environ[ADDRESS_VARIABLE] = address
            yield
        finally:
            os.environ.pop(ADDRESS_VARIABLE, None)
            _stop(process, grace_seconds=_KEPT_GRACE_SECONDS)
            _kill_group(process.pid, signal.SIGKILL)


def end_orphan(identity: ProcessIdentity, *, grace_seconds: float) -> bool:
    """End what is left of a stage whose loop was killed -> whether anything was.

    The kernel does not give a pid away while it names a process group, so a group without its leader is still ours.
    """
    if identity.namespace != _namespace() or not _group_lives(identity.pid):
        return False
    if _start_time(identity.pid) not in ("", identity.start_time):
        return False
    _kill_group(identity.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while _group_lives(identity.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    _kill_group(identity.pid, signal.SIGKILL)
    return True


def last_error(log_path: Path) -> str:
    """Find the line that says why a command failed -> the tool's error line, else the exception's, else the last."""
    lines = _tail(log_path)
    for pattern in (_ERROR_LINE, _EXCEPTION_LINE):
        for line in reversed(lines):
            if (match := pattern.match(line)) and "ChildFailedError" not in line:
                return match.group(1)
    return lines[-1] if lines else "it wrote nothing"


def tool_exit_code(returncode: int, log_path: Path) -> int:
    """Read a stage's own exit code -> int. torchrun itself ends with 1 whatever its ranks, or a signal, ended with."""
    if returncode == 1:
        for line in reversed(_tail(log_path)):  # torchrun's root cause comes last
            if match := _TORCHRUN_EXIT_CODE.search(line):
                return int(match[1]) if match[1] else -int(match[2])
    return returncode


def _tail(log_path: Path) -> list[str]:
    """Read the last attempt's end -> its non-empty lines."""
    with open(log_path, "rb") as file:
        file.seek(max(0, os.path.getsize(log_path) - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    return [line for line in lines[starts[-1] + 1 if starts else 0 :] if line.strip()]


def _stop(process: subprocess.Popen[bytes], *, grace_seconds: float) -> None:
    _kill_group(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=grace_seconds)
    except subprocess.TimeoutExpired:
        _kill_group(process.pid, signal.SIGKILL)
        process.wait()


def _kill_group(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def _group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _end_with_parent(parent: int, ask_for_signal: Callable[[], object]) -> None:
    """Run in the child before exec: end when the loop dies, however it dies."""
    ask_for_signal()
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def _start_time(pid: int) -> str:
    try:
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the command in parentheses may hold spaces


def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


def _open_terminal() -> tuple[int, int]:
    """Open a pseudo-terminal as wide as ours -> (our end, the command's end)."""
    master, slave = pty.openpty()
    columns, rows = shutil.get_terminal_size()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return master, slave


def _relay(master: int, log: IO[bytes], terminal: TextIO, process: subprocess.Popen[bytes]) -> None:
    """Copy the command's output to the log, finished lines only, and the line under way to the terminal."""
    line = b""
    while True:
        ready, _, _ = select.select([master], [], [], 0.2)
        if not ready:
            if process.poll() is not None:
                break
            continue
        try:
            block = os.read(master, 1 << 16)
        except OSError:  # Linux: every holder of the other end has gone
            break
        if not block:
            break
        *finished, line = (line + block).replace(b"\r\n", b"\n").split(b"\n")
        for text in finished:
            log.write(text.rpartition(b"\r")[2] + b"\n")
        log.flush()
        shown = line.rpartition(b"\r")[2].decode("utf-8", errors="replace")
        if b"\r" in line and shown.strip():
            terminal.write(f"\r{shown[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            terminal.flush()
    if line:
        log.write(line.rpartition(b"\r")[2] + b"\n")
    terminal.write("\r\x1b[K")
    terminal.flush()
