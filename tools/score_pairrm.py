#!/usr/bin/env python3
"""Judge rollouts pair by pair into a preference dataset. The same as `megatron-sppo score`."""

from megatron_sppo.command_line import run
from megatron_sppo.commands.score import main

if __name__ == "__main__":
    run(main, name="score_pairrm.py")
