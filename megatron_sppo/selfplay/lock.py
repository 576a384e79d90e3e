"""One command at a time in a run directory.

The lock is the kernel's (`flock`): it goes with the process that holds it, so that a killed command leaves none behind.
The file's text only says who holds it.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_sppo.errors import ConfigError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of `run_dir` for the block.

    Raises:
        ConfigError: another process holds it; the message names the process.
    """
    path = Path(run_dir, LOCK_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(
                f"{run_dir} is in use by another self_play command (process {holder}). "
                "Wait for it, stop it, or give another --output."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
