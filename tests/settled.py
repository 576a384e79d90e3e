"""Settles a process once it has imported what it works with: collections leave that alone, and forks of it are cheap.

A process that has imported torch and Megatron-Core holds 80,000 pages; to fork it and to end its child cost 40 ms of
CPU time, and 10 where these lie in huge pages: a fork then copies one entry for 512. A collection in a child would
visit, and so copy, every object of its parent's.
"""

import ctypes
import gc

from megatron_sppo.command_line import COLLECTED_AFTER

_SIZE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1


def settle(*, for_forks: bool = True) -> None:
    """End what `gc.disable()` before the imports began.

    Args:
        for_forks: gather memory into huge pages too, which takes a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTED_AFTER)  # as in the commands
    gc.enable()
    if for_forks:
        _collapse()


def _collapse() -> None:
    """Gather what this process has allocated so far into huge pages; nothing where the kernel does not."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open("/proc/self/maps") as maps:
        mappings = [line.split() for line in maps]
    for place, access, _, _, inode, *name in mappings:
        if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in place.split("-"))
            start = -(-start // _SIZE) * _SIZE
            if start < end // _SIZE * _SIZE:
                madvise(start, end // _SIZE * _SIZE - start, _MADV_COLLAPSE)
