"""Commands as processes of their own, forked from one that has imported what they need once.

What is forked runs a script from its first line, and is killed and stopped as any process. So are the stages that a
loop starts, torchrun's ranks, and the commands of a shell whose `python` is `forking_python`'s: they are forked as they
would be started anew, with sessions, signals and files of theirs. What differs is that their modules are there before
their first line (those of vLLM alone take 12 seconds), and that their command line in /proc is the server's: who has a
file open is asked of its files.
"""

import atexit
import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/pretrain_sppo.py"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.e2e.imported_once"])
_SERVER: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
_ADDRESS_VARIABLE = "MEGATRON_SPPO_TESTS_FORK_SERVER"
FORKED_MODULES = (
    "megatron_sppo",
    "megatron_sppo.cluster.kept",
    "megatron_sppo.rollout.template_child",
    "torch.distributed.run",
    "vllm.entrypoints.openai.api_server",
)
"""What is forked of that which `python -m` starts; scripts are too."""


class Forked:
    """A script, or a module (by its name), under way; its methods are those of `subprocess.Popen`."""

    def __init__(
        self,
        program: Path | str,
        arguments: Sequence[object],
        environment: Mapping[str, str] | None = None,
        *,
        directory: Path = ROOT,
        stderr: Path | None = None,
        stdin: Path = Path(os.devnull),
    ) -> None:
        self._said = _empty_file(), stderr or _empty_file()
        words = [str(program), *map(str, arguments)]
        if isinstance(program, str):
            words.insert(0, "-m")
        given = (words, {**os.environ, **(environment or {})}, directory, (stdin, *self._said))
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

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end -> (what it said on stdout, on stderr)."""
        self.wait(timeout)
        with contextlib.suppress(FileNotFoundError):
            self._texts = self._said[0].read_text(), self._said[1].read_text()
            for path in self._said:
                path.unlink()
        return self._texts


def run_forked(
    program: Path | str,
    arguments: Sequence[object] = (),
    environment: Mapping[str, str] | None = None,
    *,
    directory: Path = ROOT,
    stdin: Path = Path(os.devnull),
    timeout: float = 900,
) -> "subprocess.CompletedProcess[str]":
    """Run a script, or a module, to its end -> exit code and what it said."""
    forked = Forked(program, arguments, environment, directory=directory, stdin=stdin)
    try:
        out, err = forked.communicate(timeout)
    finally:
        forked.kill()
    return subprocess.CompletedProcess([str(program)], forked.wait(), out, err)


class Training(Forked):
    """A run of training under way."""

    def __init__(self, arguments: Sequence[object], environment: Mapping[str, str] | None = None) -> None:
        super().__init__(SCRIPT, arguments, environment)


def share_server() -> None:
    """Start the process that is forked from, for the processes too that this one starts; it ends with this one."""
    _SERVER.ensure_running()
    os.environ[_ADDRESS_VARIABLE] = _SERVER._forkserver_address


def _take_shared_server(address: str) -> None:
    """Fork from the process that another has started (multiprocessing.forkserver, Python 3.11 to 3.13)."""
    _SERVER._forkserver_address = address
    _SERVER._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)  # the other's keeps it alive
    _SERVER.ensure_running = multiprocessing.resource_tracker.ensure_running


if _ADDRESS_VARIABLE in os.environ:
    _take_shared_server(os.environ[_ADDRESS_VARIABLE])


def hear_signals() -> None:
    """Hear SIGINT and SIGHUP as a process that a person started: tests may run under nohup, which is inherited."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _empty_file() -> Path:
    descriptor, name = tempfile.mkstemp()
    os.close(descriptor)
    return Path(name)


def _main(words: list[str], environment: dict[str, str], directory: Path, places: tuple[Path, Path, Path]) -> None:
    hear_signals()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for number, place in enumerate(places):
        how = os.O_RDONLY if number == 0 else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(place, how, 0o600), number)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler as torchrun

    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    torchrun.Popen = ForkingPopen  # type: ignore[attr-defined]
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]  # functions that are called in a process of their own
    atexit._clear()
    try:
        _run(words)
    finally:
        _end()


def _run(words: Sequence[str]) -> None:
    """Run what `python WORDS` would."""
    sys.orig_argv = [sys.executable, *words]
    _customize()
    words, is_unbuffered = _without_options(words)
    sys.stdin = open(0, closefd=False)  # multiprocessing has put another in its place
    if is_unbuffered:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    is_module = words[0] == "-m"
    sys.argv = list(words[is_module:])
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def _customize() -> None:
    """Run the `sitecustomize` of a folder on PYTHONPATH, if there is one, as Python does at its start."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if (found := Path(folder, "sitecustomize.py")).is_file():
            runpy.run_path(str(found))
            break


class ForkingPopen(subprocess.Popen[Any]):
    """Starts the package's commands, and scripts, of this Python by a fork; all else as ever."""

    def _execute_child(self, *given: Any) -> None:
        """Fork where `subprocess` (3.11 to 3.13) forks and executes; the order of arguments is its own."""
        command, _executable, preexec_fn, _close, pass_fds, cwd, env = given[:7]
        child_ends, new_session = (given[10], given[13], given[15]), given[21]
        if isinstance(command, str) or not _is_ours(command) or pass_fds:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            _be(command, env, cwd, child_ends, preexec_fn, new_session=new_session)
        self._child_created = True
        self._close_pipe_fds(*given[10:16])  # type: ignore[attr-defined]


def _is_ours(command: Sequence[str]) -> bool:
    program, *words = [str(word) for word in command]
    if program != sys.executable:
        return False
    words, _ = _without_options(words)
    return words[1] in FORKED_MODULES if words[0] == "-m" else words[0].endswith(".py")


def _without_options(words: Sequence[str]) -> tuple[list[str], bool]:
    """Leave out Python's -P, which is as it is here, and -u -> (the words behind them, whether there was a -u)."""
    first = next(number for number, word in enumerate(words) if word not in ("-P", "-u"))
    return list(words[first:]), "-u" in words[:first]


def _be(
    command: Sequence[str],
    environment: Mapping[str, str] | None,
    directory: str | None,
    descriptors: tuple[int, ...],
    preexec_fn: Callable[[], object] | None,
    *,
    new_session: bool,
) -> NoReturn:
    """Be a command from its first line to its exit; nothing of the process that forked it is seen or undone."""
    code: object = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if new_session:
            os.setsid()
        if preexec_fn is not None:
            preexec_fn()
        for number, descriptor in enumerate(descriptors):
            if descriptor >= 0:
                os.dup2(descriptor, number)
        _let_go_of_files()
        if directory is not None:
            os.chdir(directory)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        atexit._clear()
        logging.root.handlers.clear()
        random.seed()
        _run([str(word) for word in command[1:]])
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:  # noqa: BLE001 (as Python itself at its end)
        traceback.print_exc()
    _end()
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(int(code or 0) & 0xFF)  # type: ignore[call-overload]


def _end() -> None:
    """Do what Python does at its end and a forked process leaves out: wait for threads, call exit functions."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def _let_go_of_files() -> None:
    """Lead every file of the parent but the three standard ones to nothing.

    Their numbers stay taken: objects of the parent live on here, and one that is collected closes its number, which
    must not be another's by then (gloo's thread ends the process when its epoll is closed).
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != nothing:
            os.dup2(nothing, number, inheritable=False)


def open_files(directory: Path) -> list[str]:
    """Find the files of a directory that any process has open: a killed run may leave no writer behind."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (place := os.readlink(link)).startswith(f"{directory}{os.sep}"):
                found.append(place)
    return found
