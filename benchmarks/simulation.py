"""One rank of any world in one process: torch's fake process group, in which no collective moves anything.

For shapes, groups and memory; every number that a collective would bring is made up.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sppo.training import parallel
from megatron_sppo.training.config import ParallelConfig


@contextlib.contextmanager
def simulated_rank(config: ParallelConfig, *, rank: int, world_size: int) -> Iterator[None]:
    """Be `rank` of a world that does not exist, with all of Megatron-Core's process groups, until the block ends."""
    assert not torch.distributed.is_initialized()
    original = torch.distributed.new_group

    def new_group(*arguments: Any, **settings: Any) -> Any:
        return original(*arguments, **(settings | {"backend": "fake"}))

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    torch.distributed.new_group = new_group
    try:
        parallel.initialize(config, seed=1)
        yield
    finally:
        torch.distributed.new_group = original
        parallel.shut_down()
