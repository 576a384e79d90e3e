"""Judge rollouts pair by pair: a rollout directory in, a preference dataset out. The same command resumes.

With --workers or --ray several workers judge shards at once, on this machine or on a Ray cluster. With --from-dataset
nothing is judged: the targets are rebuilt from the stored logits under another --preset or --selection.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sppo import config
from megatron_sppo.command_line import refuse_ranks
from megatron_sppo.judge.config import ScoreConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Command(ScoreConfig):
    """The scoring, and how to report it."""

    json: bool = False
    """Print the outcome as one JSON object."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Parse the command line, judge or rebuild, report."""
    command = config.parse(Command, name=name, argv=argv, description=__doc__ or "")
    refuse_ranks(name)
    from megatron_sppo.judge.score import rebuild, score  # brings torch, which --help need not wait for

    diagnostics = score(command) if command.from_dataset is None else rebuild(command, command.from_dataset)
    for warning in diagnostics.get("warnings", ()):
        logger.warning("%s", warning)
    for reason, number in diagnostics.get("quarantine_reasons", {}).items():
        logger.warning("%d set aside: %s", number, reason)
    if command.json:
        print(json.dumps({"output": str(command.output), **diagnostics}))
    else:
        print(
            f"{command.output}: {diagnostics['num_prompts']} prompts x {diagnostics['num_responses']} responses judged "
            f"by {diagnostics['judge']}, {diagnostics['num_quarantined']} set aside"
        )
        if diagnostics.get("one_order_agreement") is not None:
            print(
                f"one order names the winner of both in {100 * diagnostics['one_order_agreement']:.1f} % of the pairs"
            )
    sys.stdout.flush()
