#!/usr/bin/env python3
"""Sample K responses for each prompt. The same as `megatron-sppo rollouts`."""

from megatron_sppo.command_line import run
from megatron_sppo.commands.rollouts import main

if __name__ == "__main__":
    run(main, name="generate_rollouts.py")
