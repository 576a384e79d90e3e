"""What a user can mend: each class is one kind of fault, its message one line (fact, place, remedy).

Programmers' mistakes are `assert`; these are for people. The tools print the message and exit with code 2.
"""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot be run."""


class DataError(ValueError):
    """Prompts, rollouts, judge output or a dataset on disk that cannot be used."""


class ConversionError(ValueError):
    """A checkpoint that cannot be read, mapped or written."""
