#!/usr/bin/env python3
"""Write log pi_theta / pi_t of every token. The same as `megatron-sppo inspect`."""

from megatron_sppo.command_line import run
from megatron_sppo.commands.inspect import main

if __name__ == "__main__":
    run(main, name="inspect_log_ratio.py")
