"""What tyro refuses, as one line; it says it in boxes."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NoReturn

from megatron_sppo.errors import ConfigError


def raise_config_error(exit_: SystemExit, boxed: str, flags_of_file: set[str], file: str) -> NoReturn:
    """Say in one line why tyro refused; a section's own ConfigError, which tyro wraps, comes out as it was."""
    cause = exit_.__context__
    while cause is not None:
        if isinstance(cause, ConfigError):
            raise cause from None
        cause = cause.__context__
    message = " ".join(_boxed_text(boxed)).rstrip(".")
    message = re.sub(r"typing\.Annotated\[(\w+), [^\]]*\]", r"\1", message)
    origin = f"{file}: " if any(flag in message for flag in flags_of_file) else ""
    raise ConfigError(f"{origin}{message}. Run with --help for what each flag takes.") from None


def _boxed_text(boxed: str) -> Iterator[str]:
    """Take a message out of tyro's frame, up to the first rule (below it stands the flag's help) -> its lines."""
    said = False
    for line in boxed.splitlines()[1:]:
        text = line.strip("\u2502|+\u2570\u256f ")
        is_rule = not text.strip("\u2500-")
        if text and is_rule and said:
            return
        if not is_rule:
            said = True
            yield text


@contextlib.contextmanager
def wide_console() -> Iterator[None]:
    """Keep tyro from wrapping a message inside its frame, which could cut a path in two."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
