#!/usr/bin/env python3
"""Plan a run before it is started. The same as `megatron-sppo plan`."""

from megatron_sppo.command_line import run
from megatron_sppo.commands.plan import main

if __name__ == "__main__":
    run(main, name="plan.py")
