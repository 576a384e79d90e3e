"""Training as processes of its own, forked from one that has imported torch, Megatron-Core and training once.

What is forked runs examples/pretrain_sppo.py from its first line, and is killed and stopped as any process. Its command
line is the server's: who has it still open is asked of its files.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples/pretrain_sppo.py"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "megatron.core.optimizer",
        "megatron.core.dist_checkpointing.strategies.torch",
        "megatron_sppo.training.checkpoint",
        "megatron_sppo.training.inputs",
        "megatron_sppo.training.loop",
        "megatron_sppo.training.optimizer",
        "megatron_sppo.training.references",
        "megatron_sppo.training.policy",
        "megatron_sppo.training.reference",
        "megatron_sppo.training.saving",
    ]
)


class Training:
    """A run under way; its methods are those of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[object], environment: Mapping[str, str] | None = None) -> None:
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._said = Path(name)
        given = (list(map(str, arguments)), {**os.environ, **(environment or {})}, name)
        self._process = _CONTEXT.Process(target=_main, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it has not ended within {timeout} s"
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for its end -> (None, what it said on stderr)."""
        self.wait(timeout)
        with contextlib.suppress(FileNotFoundError):
            self._text = self._said.read_text()
            self._said.unlink()
        return None, self._text


def hear_signals() -> None:
    """Hear SIGINT and SIGHUP as a process that a person started: tests may run under nohup, which is inherited."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _main(arguments: list[str], environment: dict[str, str], said: str) -> None:
    hear_signals()
    os.environ.clear()
    os.environ.update(environment)
    nothing, errors = os.open(os.devnull, os.O_RDWR), os.open(said, os.O_WRONLY)
    for descriptor, number in ((nothing, 0), (nothing, 1), (errors, 2)):
        os.dup2(descriptor, number)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def open_files(directory: Path) -> list[str]:
    """Find the files of a directory that any process has open: a killed run may leave no writer behind."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (place := os.readlink(link)).startswith(f"{directory}{os.sep}"):
                found.append(place)
    return found
