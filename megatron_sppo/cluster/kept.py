"""A process whose workers leave things to the next: an engine starts once and serves stage after stage.

Its owner (self-play) starts it, names its socket to the stages in an environment variable and ends it. A stage that may
use it sends what makes its worker, and then tasks, of which results come back as they do from any desk; one stage at a
time. What a worker leaves behind (`worker.left_behind`) the next one finds. A stage that goes away in mid-work leaves a
worker that cannot be stopped: then the process ends.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from megatron_sppo.cluster.worker import Desk, Reply, ResultT, TaskT, Worker, keep_what_workers_leave
from megatron_sppo.command_line import set_up_logging
from megatron_sppo.errors import DataError

ADDRESS_VARIABLE = "MEGATRON_SPPO_KEPT_WORKER"
"""The socket's path, in a directory that nobody else can enter."""


def kept_address() -> str | None:
    """Where a process is kept for the stages of this run -> path, or None."""
    return os.environ.get(ADDRESS_VARIABLE) or None


def run_kept(
    address: str,
    make_worker: Callable[[], Worker[TaskT, ResultT]],
    tasks: Iterable[TaskT],
    report: Callable[[int, int], None],
    *,
    seconds: float = 0.0,
) -> Iterator[tuple[TaskT, ResultT]]:
    """Work tasks off in the kept process -> (task, its result), each once, as soon as it is there.

    Args:
        make_worker: picklable.
        report: told what the worker reports (`Worker.run`).
        seconds: without an answer, or without any progress, after which the worker is taken to hang; 0: never.

    Raises:
        DataError: the process has ended, or hangs.
        ConfigError, DataError, ConversionError, OSError, WorkerCrashed: what the worker raises; the process is gone.
    """
    waiting, at_work = iter(tasks), dict[int, TaskT]()
    given: tuple[TaskT, ...] = ()
    is_end, progressed = False, time.monotonic()
    try:
        with Client(address, "AF_UNIX") as process:
            process.send(make_worker)
            while True:
                process.send((given, is_end))
                if seconds and (not process.poll(seconds) or time.monotonic() - progressed > seconds):
                    raise DataError(
                        f"the process that keeps the run's engine has made no progress for {seconds:.0f} s "
                        "(--worker-timeout) and is taken to hang; its log says what it did last. Run the same command "
                        "again."
                    )
                reply: Reply = process.recv()
                if reply.units or reply.amount or reply.results or (reply.is_ready and not at_work):
                    progressed = time.monotonic()
                report(reply.units, reply.amount)
                for result in reply.results:
                    yield at_work.pop(result.index), result
                if reply.failure is not None:
                    raise reply.failure
                if reply.has_ended:
                    break
                given = tuple(itertools.islice(waiting, reply.num_wanted))
                at_work |= {task.index: task for task in given}
                is_end = is_end or len(given) < reply.num_wanted
    except (EOFError, ConnectionError, FileNotFoundError):
        raise DataError(
            "the process that keeps the run's engine has ended: see logs/engine.log in the run's directory. "
            "Run the same command again, or with --no-keep-engine."
        ) from None
    assert not at_work, f"the worker left {len(at_work)} tasks without a result"


def serve(address: str) -> None:
    """Make workers for one stage after the other, as they ask; ends when a stage goes away in mid-work."""
    keep_what_workers_leave()
    with Listener(address, "AF_UNIX") as listener:
        while True:
            with listener.accept() as stage:
                try:
                    _serve_stage(stage)
                except (EOFError, ConnectionError):
                    os._exit(1)  # an engine's thread would keep the interpreter


def _serve_stage(stage: Connection[Any, Any]) -> None:
    desk = Desk(stage.recv())
    while True:
        tasks, is_end = stage.recv()
        reply = desk.exchange(None, tasks, has_more=not is_end, is_end=is_end)
        stage.send(reply)
        if reply.has_ended:
            return


if __name__ == "__main__":
    set_up_logging(debug=False)
    serve(sys.argv[1])
