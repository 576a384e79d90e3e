"""Which rank judges which shard: one list for all ranks, taken from the front whenever one is free.

Who took a shard changes nothing in its scores, so the list keeps no record that could be wrong after a kill: what is
done is what has a score file. The ranks share a few counters in torch's key-value store, and no collective: none waits
for another but the first, and that one only as long as something still moves.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from megatron_sppo.command_line import launch

_START_TIMEOUT = datetime.timedelta(hours=2)
"""Ranks may load their judge one after the other from a slow disk."""


class WorkList:
    """The shards of one run, in the order in which they are given out; of one process alone unless it has a store."""

    def __init__(self, *, rank: int = 0, world_size: int = 1, store: Store | None = None) -> None:
        assert world_size == 1 or store is not None
        self.rank, self.world_size = rank, world_size
        self._store = store
        self._counters = {"taken": 0, "finished": 0, "pairs": 0, "left": 0}

    def take(self, order: Sequence[int]) -> int | None:
        """Take the next of `order`, which must be the same on all ranks -> shard number, None when all are taken."""
        position = self._add("taken", 1) - 1
        return order[position] if position < len(order) else None

    def finish(self) -> None:
        """Say that a shard that was taken has its file."""
        self._add("finished", 1)

    @property
    def num_finished(self) -> int:
        """Shards that some rank has found finished, or has finished, in this run."""
        return self._add("finished", 0)

    def report(self, num_pairs: int) -> None:
        """Add what this rank has judged to the run's count."""
        self._add("pairs", num_pairs)

    @property
    def num_pairs(self) -> int:
        """Pairs judged by all ranks so far."""
        return self._add("pairs", 0)

    def tell(self, answer: bool) -> None:
        """Answer every other rank's `ask`; for the first rank."""
        if self._store is not None:
            self._store.set("answer", str(int(answer)))

    def ask(self) -> bool:
        """Wait for what the first rank says -> its answer."""
        assert self._store is not None
        self._store.wait(["answer"], _START_TIMEOUT)
        return self._store.get("answer") == b"1"

    def leave(self) -> None:
        """Say that this rank asks nothing of the store any more."""
        self._add("left", 1)

    def wait_for_leavers(self, seconds: float) -> None:
        """Keep the store, which may live in this process, until all other ranks have left or the time is over."""
        deadline = time.monotonic() + seconds
        while self._add("left", 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)

    def _add(self, name: str, number: int) -> int:
        if self._store is not None:
            return self._store.add(name, number)
        self._counters[name] += number
        return self._counters[name]


def open_work_list() -> WorkList:
    """Join the ranks that torchrun, or a launcher that sets the same variables, has started -> WorkList."""
    if launch().world_size == 1:
        return WorkList()
    store, rank, world_size = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
    return WorkList(rank=rank, world_size=world_size, store=PrefixStore("score_pairrm", store))
