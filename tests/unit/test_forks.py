"""A process that a test forks lives, whatever its parent has left to be collected (tests/conftest.py)."""

import gc
import os

import pytest


class Deadly:
    """Ends any other process that collects it."""

    def __init__(self) -> None:
        self.itself, self.process = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(9)


def test_it_leaves_the_garbage_of_its_parent_alone(request: pytest.FixtureRequest) -> None:
    gc.disable()
    request.addfinalizer(gc.enable)
    Deadly()
    child = os.fork()
    if child == 0:
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
