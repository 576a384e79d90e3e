"""Proves how long ranks wait for what rank 0 finds out: as long as it is at work, and no longer.

What they are told, and its faults, are in tests/distributed/test_verified_load.py and test_layouts.py.
"""

import threading
import time

import pytest
import torch.distributed as dist

from megatron_sppo.training import parallel


def test_whoever_waits_for_rank_zero_waits_while_it_is_at_work_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For twice its patience and more."""
    monkeypatch.setattr(parallel, "_BEAT_SECONDS", 0.02)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)

    def work() -> None:
        with parallel._beating(server):
            time.sleep(3)
        server.set("found", "it")

    thread = threading.Thread(target=work)
    thread.start()
    parallel._wait_while_beating(client, "found", seconds=1)
    thread.join()
    assert client.get("found") == b"it"
    with pytest.raises(dist.DistStoreError):
        parallel._wait_while_beating(client, "something else", seconds=0.3)
