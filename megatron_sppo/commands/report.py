"""Write one self-contained report.html of a self-play run, from its directory alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sppo.config import parse


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report on."""

    run: Path
    """Run directory of `megatron-sppo self-play`."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Write the report and say where it is."""
    config = parse(ReportConfig, name=name, argv=argv, description=__doc__ or "")
    from megatron_sppo.report.page import write_report  # brings torch and matplotlib: --help need not wait for them

    print(write_report(config.run))
