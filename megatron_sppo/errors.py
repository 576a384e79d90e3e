"""What a user can fix: each class is one kind of fault, its message one line (fact, place, remedy).

Programmers' mistakes are `assert`; these are for people. The tools print the message and exit with code 2.
"""

from collections.abc import Sequence


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot be run."""


class DataError(ValueError):
    """Prompts, rollouts, judge output or a dataset on disk that cannot be used."""


class ConversionError(ValueError):
    """A checkpoint that cannot be read, mapped or written."""


class MachineError(RuntimeError):
    """A machine that computes wrongly: what ranks must hold alike differs. The tools exit with code 3."""


def some_of(names: Sequence[str], *, most: int = 4) -> str:
    """Name the first few of a list for a message -> "a, b, c, d and 3 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
