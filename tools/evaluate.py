#!/usr/bin/env python3
"""Compare a policy's answers with the base's and the previous policy's. The same as `megatron-sppo evaluate`."""

from megatron_sppo.command_line import run
from megatron_sppo.commands.evaluate import main

if __name__ == "__main__":
    run(main, name="evaluate.py")
