#!/usr/bin/env python3
"""Turn other projects' preference data into rollouts. The same as `megatron-sppo import-preferences`."""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import import_preferences

NAME = "import_preferences.py"
main = partial(import_preferences.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
