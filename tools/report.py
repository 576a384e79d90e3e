#!/usr/bin/env python3
"""Write the report of a self-play run. The same as `megatron-sppo report`."""

from megatron_sppo.command_line import run
from megatron_sppo.commands.report import main

if __name__ == "__main__":
    run(main, name="report.py")
