#!/usr/bin/env python3
"""Align a model by self-play. The same as `megatron-sppo self-play`."""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import self_play

NAME = "self_play.py"
main = partial(self_play.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
