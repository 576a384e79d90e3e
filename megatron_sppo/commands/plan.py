"""Plan a run before it is started: memory of each rank, FLOPs, time and traffic, and whether it fits. Needs no GPU.

megatron-sppo plan --config examples/configs/llama3_70b_h100.yaml --world-size 32 64 512
"""

import json
import sys
from collections.abc import Sequence

from megatron_sppo.planning.config import read_plan
from megatron_sppo.planning.plan import make_report
from megatron_sppo.planning.text import render


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Plan and print."""
    config, file = read_plan(sys.argv[1:] if argv is None else argv, name=name, description=__doc__ or "")
    report = make_report(config, config_file=file)
    print(json.dumps(report.to_json(), indent=2) if config.plan.json else render(report))
