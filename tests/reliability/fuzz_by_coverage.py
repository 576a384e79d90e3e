"""One reader under atheris: `python -m tests.reliability.fuzz_by_coverage READER [flags of libFuzzer] [CORPUS]`."""

import logging
import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["megatron_sppo"]):
    from tests.reliability.readers import READERS


def main() -> None:
    """Read whatever bytes lead to lines that were not reached before, until the time is over."""
    logging.disable(logging.CRITICAL)
    reader, directory = READERS[sys.argv[1]], Path(os.environ["FUZZ_DIRECTORY"])
    atheris.Setup([sys.argv[0], *sys.argv[2:]], lambda content: reader.try_bytes(directory, content))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
