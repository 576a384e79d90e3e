#!/usr/bin/env python3
"""Turn other projects' preference data into rollouts. The same as `megatron-sppo import-preferences`."""

from megatron_sppo.command_line import run
from megatron_sppo.commands.import_preferences import main

if __name__ == "__main__":
    run(main, name="import_preferences.py")
