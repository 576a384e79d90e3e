#!/usr/bin/env python3
"""Write the report of a self-play run. The same as `megatron-sppo report`."""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import report

NAME = "report.py"
main = partial(report.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
