#!/usr/bin/env python3
"""Align a model by self-play. The same as `megatron-sppo self-play`."""

from megatron_sppo.command_line import run
from megatron_sppo.commands.self_play import main

if __name__ == "__main__":
    run(main, name="self_play.py")
