"""What the training thread needs next, made by another thread while the device works on what came before."""

import contextlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

DEPTH = 2
"""Items that may lie ready. Making one takes milliseconds and a step seconds: one hides it, two a slow disk."""

_making = threading.Lock()
"""Held while an item is made. A checkpoint's writers are forked, and of a lock that another thread holds just then
(an allocator's, say) a forked process would wait for ever: so a fork waits for the item."""
os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


@dataclass(frozen=True)
class _End:
    """No more items: there are none, or making one raised this."""

    error: BaseException | None = None


@contextlib.contextmanager
def ahead(items: Iterable[T], *, depth: int = DEPTH) -> Iterator[Iterator[T]]:
    """Have a thread make up to `depth` items beyond the one in use, in their order -> an iterator over them.

    An exception in the thread is raised where its item would have been taken. The thread ends with the block, at the
    latest when the item that it is making is done.
    """
    made: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room, stopped = threading.Semaphore(depth), threading.Event()
    # A thread begins on device 0, where page-locked memory would make a context for every rank of the machine.
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def make() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            iterator = iter(items)
            while room.acquire() and not stopped.is_set():
                with _making:
                    made.put(next(iterator))
        except StopIteration:
            made.put(_End())
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that takes
            made.put(_End(error))

    def take() -> Iterator[T]:
        while True:
            item = made.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            room.release()
            yield item

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stopped.set()
        room.release()
        thread.join()
