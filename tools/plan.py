#!/usr/bin/env python3
"""Plan a run before it is started. The same as `megatron-sppo plan`."""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import plan

NAME = "plan.py"
main = partial(plan.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
