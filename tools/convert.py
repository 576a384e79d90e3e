#!/usr/bin/env python3
"""Convert a model between Hugging Face and Megatron-Core, and verify that both are the same.

The same as `megatron-sppo convert`.
"""

from functools import partial

from megatron_sppo.command_line import run
from megatron_sppo.commands import convert

NAME = "convert.py"
main = partial(convert.main, NAME)

if __name__ == "__main__":
    run(main, name=NAME)
