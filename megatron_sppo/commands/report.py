#!/usr/bin/env python3
"""Write one self-contained report.html of a self-play run, from its directory alone."""

from dataclasses import dataclass
from pathlib import Path

from megatron_sppo.config import parse

NAME = "report.py"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report on."""

    run: Path
    """Run directory of tools/self_play.py."""


def main() -> None:
    """Write the report and say where it is."""
    config = parse(ReportConfig, name=NAME, description=str(__doc__))
    from megatron_sppo.report.page import write_report  # brings torch and matplotlib: --help need not wait for them

    print(write_report(config.run))
