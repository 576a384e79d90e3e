"""Proves of items made by another thread: their order, how many are made, whose exception is raised, and the end.

That training gives the same numbers with it is proved wherever a run is held against another (tests/distributed,
tests/e2e).
"""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from megatron_sppo.errors import DataError
from megatron_sppo.training.ahead import ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ahead"]


def test_items_come_in_their_order_and_are_made_by_another_thread() -> None:
    makers = set()

    def items() -> Iterator[int]:
        for number in range(50):
            makers.add(threading.current_thread().name)
            yield number

    with ahead(items()) as taken:
        assert list(taken) == list(range(50))
    assert makers == {"ahead"}
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_items_are_made_beyond_the_one_in_use(depth: int) -> None:
    made, full = [], threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            full.release()
            yield number

    with ahead(items(), depth=depth) as taken:
        for _ in range(depth):
            full.acquire()  # the thread fills the room before anything is taken, and no more
        for number in taken:
            if number + depth < 20:
                full.acquire()
            assert len(made) <= number + 1 + depth
    assert made == list(range(20))


def test_an_exception_is_raised_with_its_type_where_its_item_would_have_been_taken() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise DataError("tokens.bin is damaged.")

    taken = []
    with pytest.raises(DataError, match=r"^tokens\.bin is damaged\.$"), ahead(items()) as numbers:
        taken.extend(numbers)
    assert taken == [0, 1, 2]
    assert threads() == []


@pytest.mark.parametrize("fault", [None, ValueError("loss is not finite")])
def test_the_thread_ends_with_the_block_whatever_ends_that(fault: Exception | None) -> None:
    """Items without end: the block ends after the third, and with it the thread, which has planned a few more."""

    def items() -> Iterator[int]:
        number = 0
        while True:
            yield (number := number + 1)

    caught = None
    try:
        with ahead(items()) as numbers:
            for number in numbers:
                if number == 3:
                    if fault is not None:
                        raise fault
                    break
    except ValueError as error:
        caught = error
    assert caught is fault and number == 3
    assert threads() == []


def test_a_process_is_forked_between_two_items_and_not_in_one() -> None:
    """The fork begins while the first item is being made: it is done when the child looks."""
    begun, done = threading.Event(), []

    def items() -> Iterator[int]:
        for number in range(5):
            begun.set()
            time.sleep(0.05)
            done.append(number)
            yield number

    with ahead(items(), depth=1) as numbers:
        begun.wait()
        child = os.fork()
        if child == 0:
            os._exit(len(done))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) >= 1
        assert list(numbers) == list(range(5))
