#!/usr/bin/env python3
"""Convert a model between Hugging Face and Megatron-Core, and verify that both are the same.

The same as `megatron-sppo convert`.
"""

from megatron_sppo.command_line import run
from megatron_sppo.commands.convert import main

if __name__ == "__main__":
    run(main, name="convert.py")
