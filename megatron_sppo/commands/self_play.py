"""Align a model by self-play: rollouts, preferences, training and evaluation, iteration by iteration.

The same command again goes on where the last one stopped.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from megatron_sppo.config import LAYOUT, parse
from megatron_sppo.cpu import is_slow_in_bfloat16
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.storage import own_or_packaged

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Command(SelfPlayConfig):
    """The run, and how to report it."""

    json: Annotated[bool, LAYOUT] = False
    """Print summary.json's content in place of the table."""
    status: Annotated[bool, LAYOUT] = False
    """Start nothing: print how far the run in --output is, from any terminal. No other setting is needed."""


@dataclass(frozen=True, kw_only=True)
class StatusCommand:
    """Of which run, and how to report it."""

    output: Annotated[Path, LAYOUT]
    """Run directory."""
    json: Annotated[bool, LAYOUT] = False
    status: Annotated[bool, LAYOUT] = True


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run all iterations and print the table; or print how far they are."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if "--status" in tokens and "--help" not in tokens:
        _print_status(name, tokens)
        return
    config = parse(Command, name=name, argv=tokens, description=__doc__ or "")
    if config.status:  # in the YAML file
        _print_status_of(config.run.output, is_json=config.json)
        return
    from megatron_sppo.selfplay.loop import self_play  # --help need not wait for it
    from megatron_sppo.selfplay.paths import REPORT_NAME
    from megatron_sppo.selfplay.process import Interrupted
    from megatron_sppo.selfplay.stages import StageFailed
    from megatron_sppo.selfplay.summary import result_table

    is_here = config.run.training_launcher is None
    if is_here and config.training.model.params_dtype == "bfloat16" and is_slow_in_bfloat16():
        logger.warning(
            "this processor has no instructions for bfloat16: it samples and trains several times slower than in "
            "float32. Use --training params_dtype=float32 --rollout-options dtype=float32"
        )
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


def _print_status(name: str, tokens: list[str]) -> None:
    """Print how far the run is that --output names, alone, in a run's whole command line, or in its YAML file."""
    known = {"--status", "--json", "--output", "--config", "--debug"}
    given = {token.partition("=")[0] for token in tokens if token.startswith("--")}
    if given <= known:
        of_file = _output_alone
        found = parse(StatusCommand, name=name, argv=tokens, description=__doc__ or "", of_file=of_file)
        output, is_json = found.output, found.json
    else:
        config = parse(Command, name=name, argv=tokens, description=__doc__ or "")
        output, is_json = config.run.output, config.json
    _print_status_of(output, is_json=is_json)


def _print_status_of(run_dir: Path, *, is_json: bool) -> None:
    from megatron_sppo.selfplay.status import run_status, status_lines

    status = run_status(run_dir)
    print(json.dumps(status) if is_json else "\n".join(status_lines(status)))


def _output_alone(content: dict[str, Any]) -> dict[str, Any]:
    """Take the run directory out of a run's YAML file, where it may stand in its section."""
    section = content.get("run")
    found = content | section if isinstance(section, dict) else content
    return {"output": found["output"]} if "output" in found else {}
