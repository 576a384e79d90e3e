#!/usr/bin/env python3
"""Sample K responses for each prompt. The same as `megatron-sppo rollouts`."""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import rollouts

NAME = "generate_rollouts.py"
main = partial(rollouts.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
