"""Align a model by self-play: rollouts, preferences, training and evaluation, iteration by iteration.

The same command again goes on where the last one stopped.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from megatron_sppo.config import LAYOUT, parse
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.storage import own_or_packaged


@dataclass(frozen=True, kw_only=True)
class Command(SelfPlayConfig):
    """The run, and how to report it."""

    json: Annotated[bool, LAYOUT] = False
    """Print summary.json's content in place of the table."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run all iterations and print the table."""
    config = parse(Command, name=name, argv=argv, description=__doc__ or "")
    from megatron_sppo.selfplay.commands import REPORT_NAME  # --help need not wait for it
    from megatron_sppo.selfplay.loop import self_play
    from megatron_sppo.selfplay.process import Interrupted
    from megatron_sppo.selfplay.stages import StageFailed
    from megatron_sppo.selfplay.summary import result_table

    run = replace(config.run, prompts=tuple(map(own_or_packaged, config.run.prompts)))
    try:
        summary = self_play(replace(config, run=run))
    except StageFailed as failure:
        print(f"{name}: error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except Interrupted as interruption:
        print(f"{name}: stopped by {interruption}. The same command goes on from here.", file=sys.stderr)
        sys.exit(interruption.exit_code)
    if config.json:
        print(json.dumps(summary))
        return
    print(f"{result_table(summary)}\n\nreport: {config.run.output / REPORT_NAME}")
