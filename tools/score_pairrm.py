#!/usr/bin/env python3
"""Judge rollouts pair by pair into a preference dataset. The same as `megatron-sppo score`."""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import score

NAME = "score_pairrm.py"
main = partial(score.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
