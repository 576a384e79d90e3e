#!/usr/bin/env python3
"""Compare a policy's answers with the base's and the previous policy's. The same as `megatron-sppo evaluate`."""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import evaluate

NAME = "evaluate.py"
main = partial(evaluate.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
