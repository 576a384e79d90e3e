"""How a process ends in which something hangs: its stacks in a file, a line that says so, exit code 4."""

import contextlib
import faulthandler
import os
import sys
from pathlib import Path
from typing import NoReturn

from megatron_sppo.command_line import EXIT_HANG


def write_stacks(path: Path, *, title: str = "") -> str:
    """Write the stacks of all threads to a file, in a directory that is made where there is none -> its text.

    A disk that refuses is no reason not to end: nothing is written then, and the text is empty.

    Args:
        title: a line above them.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a link to another file
        with open(path, "w", encoding="utf-8") as file:
            if title:
                file.write(f"{title}\n")
                file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return path.read_text(encoding="utf-8")
    return ""


def end_hanging(line: str) -> NoReturn:
    """Say on stderr what hangs, and end this process at once: the thread that hangs cannot be ended, nothing unwinds.

    Args:
        line: NAME: error: FACT. REMEDY. Empty: another process says it.
    """
    if line:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    os._exit(EXIT_HANG)
