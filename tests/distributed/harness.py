"""N gloo ranks per test for the price of a fork: a server imports torch, Megatron-Core and training once, then forks.

`run_ranks(function, world_size, *args)` runs an importable top-level function in `world_size` processes that see RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as under torchrun, and gives back what each rank returned. The
function initialises and uses the process group itself. When a rank raises, its traceback is in the error and the
others are killed. The server ends with the test process, however that ends; no rank outlives a call.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from tests.settled import settle

DEFAULT_TIMEOUT = 180.0
"""Seconds for one job. Generous: a shared two-core machine is slow, and a hang shows every rank's stack."""

_REPOSITORY = Path(__file__).resolve().parents[2]
_IMPORTED_ONCE = (
    "torch",
    "torch.distributed",
    "megatron.core",
    "megatron.core.datasets.indexed_dataset",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron_sppo.training.checkpoint",
    "megatron_sppo.training.inputs",
    "megatron_sppo.training.loop",
    "megatron_sppo.training.optimizer",
    "megatron_sppo.training.policy",
    "megatron_sppo.training.reference",
    "megatron_sppo.training.references",
    "numpy.ma",
    "torch.utils.serialization",
)
_GRACE = 1.0
"""Seconds in which the other ranks may still report after the first failure: the cause may be theirs."""


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback and the end of its output."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> list[Any]:
    """Run `function(*args)` in `world_size` forked processes -> list of their return values, by rank.

    Args:
        function: defined at the top of an importable module (a test file is one). Arguments and results are pickled.
        timeout: seconds, after which every rank's stack is in the error and all are killed.

    Raises:
        RankError: a rank raised, died or did not end in time.
    """
    assert function.__qualname__.isidentifier(), f"{function.__qualname__} is not defined at the top of its module"
    job = {
        "module": function.__module__,
        "name": function.__qualname__,
        "world_size": world_size,
        "arguments": pickle.dumps(args),
        "timeout": timeout,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
    }
    server = _Server.running()
    ok, answer = server.ask(job)
    if not ok:
        raise RankError(answer)
    return [pickle.loads(result) for result in answer]


class _Server:
    """The calling side: one server process per test process, started at first use."""

    _instance: "_Server | None" = None

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.owner = os.getpid()
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        path = os.pathsep.join([str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.harness", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        theirs.close()
        atexit.register(self.stop)

    @classmethod
    def running(cls) -> "_Server":
        if cls._instance is None or cls._instance.process.poll() is not None or cls._instance.owner != os.getpid():
            cls._instance = cls()
        return cls._instance

    def ask(self, job: dict[str, Any]) -> tuple[bool, Any]:
        try:
            self.connection.send(job)
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.wait()
            self.log.seek(0)
            raise RankError(f"the fork server died ({self.process.returncode}):\n{self.log.read()[-4000:]}") from None

    def stop(self) -> None:
        if self.owner != os.getpid():
            return
        self.connection.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(control: Connection) -> None:
    """Import what is heavy, then run jobs until the caller closes the connection."""
    gc.disable()
    import torch

    torch.set_num_threads(1)
    for module in _IMPORTED_ONCE:
        importlib.import_module(module)
    _parse_once()
    settle()
    while True:
        try:
            job = control.recv()
        except EOFError:
            return
        control.send(_run_job(job, control))


def _parse_once() -> None:
    """Parse a command line: what tyro imports for it and reads of sources is there from then on."""
    from megatron_sppo import config
    from megatron_sppo.training.config import TrainingConfig

    given = ["--load", "nowhere", "--data", "nowhere", "--save", "nowhere", "--lr", "1", "--eta", "1"]
    config.parse(TrainingConfig, name="once", description="", argv=given)


def _run_job(job: dict[str, Any], control: Connection) -> tuple[bool, Any]:
    """Fork the ranks, gather their results -> (True, pickled results by rank) or (False, report)."""
    fork = multiprocessing.get_context("fork")
    world_size = job["world_size"]
    port, reservation = _reserve_port()
    ranks: list[Any] = []
    pipes: list[Connection] = []
    outputs = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(world_size)]
    try:
        for rank in range(world_size):
            ours, theirs = Pipe()
            process = fork.Process(target=_rank_main, args=(job, rank, port, theirs, outputs[rank], control))
            process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        results, failures = _gather(ranks, pipes, control, job["timeout"])
    finally:
        for process in ranks:
            _kill(process)
            process.join()
        reservation.close()
    if failures:
        return False, "\n".join(_report(rank, reason, outputs[rank]) for rank, reason in failures)
    return True, [results[rank] for rank in range(world_size)]


def _gather(
    ranks: list[Any], pipes: list[Connection], control: Connection, timeout: float
) -> tuple[dict[int, bytes], list[tuple[int, str]]]:
    """Wait for every rank's result and exit -> (results, failures in the order in which they happened)."""
    results: dict[int, bytes] = {}
    failures: dict[int, str] = {}
    running = set(range(len(ranks)))
    deadline = time.monotonic() + timeout
    while running and time.monotonic() < deadline:
        watched = [control, *(pipes[r] for r in running if r not in results and r not in failures)]
        ready = wait([*watched, *(ranks[r].sentinel for r in running)], timeout=max(0.0, deadline - time.monotonic()))
        if control in ready:
            raise SystemExit(0)  # The caller never speaks during a job: it is gone.
        for rank in sorted(running):
            if pipes[rank] in ready:
                _take(pipes[rank], rank, results, failures)
            if not ranks[rank].is_alive():
                if rank not in results and rank not in failures and not _take(pipes[rank], rank, results, failures):
                    failures[rank] = f"died without a result (exit code {ranks[rank].exitcode})"
                running.discard(rank)
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE)
    if running and not failures:
        for rank in sorted(running):
            failures[rank] = f"did not {'leave' if rank in results else 'finish'} within {timeout:.0f} s; its stacks:"
            os.kill(ranks[rank].pid, signal.SIGUSR1)
        time.sleep(_GRACE)
    return results, list(failures.items())


def _take(pipe: Connection, rank: int, results: dict[int, bytes], failures: dict[int, str]) -> bool:
    try:
        if not pipe.poll():
            return False
        ok, content = pipe.recv()
    except EOFError:
        return False
    (results if ok else failures)[rank] = content
    return True


def _rank_main(job: dict[str, Any], rank: int, port: int, pipe: Connection, output: Any, control: Connection) -> None:
    """Be one rank: own process group, own output file, torchrun's environment."""
    control.close()
    os.setpgid(0, 0)
    _die_with_parent()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
    os.chdir(job["directory"])
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world_size"], "LOCAL_WORLD_SIZE": job["world_size"]}
    os.environ.clear()
    os.environ.update(job["environment"])
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    try:
        function = getattr(importlib.import_module(job["module"]), job["name"])
        result = pickle.dumps(function(*pickle.loads(job["arguments"])))
        _leave_process_group()
    except BaseException:
        pipe.send((False, "raised\n" + traceback.format_exc()))
        raise
    pipe.send((True, result))


def _leave_process_group() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # Nobody tears the store down while another still speaks.
        torch.distributed.destroy_process_group()


def _report(rank: int, reason: str, output: Any) -> str:
    output.flush()
    output.seek(0)
    tail = output.read()[-6000:].strip()
    return f"rank {rank} {reason.rstrip()}" + (f"\n--- end of rank {rank}'s output ---\n{tail}" if tail else "")


def _reserve_port() -> tuple[int, socket.socket]:
    """Pick a port that no other job is about to listen on -> (port, what keeps it from them until it is closed).

    It is below the kernel's ephemeral range, where no connection of gloo's can take it before the ranks do. Jobs tell
    each other by a name that one process at a time can have.
    """
    while True:
        port, reservation = secrets.choice(range(20000, 30000)), socket.socket(socket.AF_UNIX)  # Ray's workers: below
        try:
            reservation.bind(f"\0megatron_sppo port {port}")
            with socket.socket() as probe:
                probe.bind(("", port))
            return port, reservation
        except OSError:
            reservation.close()


def _kill(rank: Any) -> None:
    """Kill a rank and whatever it started; nothing is left of one that ended well."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.kill()  # it may not lead a group yet; unlike os.kill this knows whether the number is still the rank's


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, even by SIGKILL."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    # Control-C reaches the whole terminal's group; the caller closes the connection, and that is enough.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    if os.getppid() != int(sys.argv[2]):
        sys.exit(0)
    serve(Connection(int(sys.argv[1])))
