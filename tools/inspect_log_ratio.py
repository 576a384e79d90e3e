#!/usr/bin/env python3
"""Write log pi_theta / pi_t of every token. The same as `megatron-sppo inspect`."""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import inspect

NAME = "inspect_log_ratio.py"
main = partial(inspect.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
