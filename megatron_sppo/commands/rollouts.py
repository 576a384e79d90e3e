"""Sample K responses for each prompt with vLLM: prompts in, a rollout directory out. The same command resumes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sppo import config
from megatron_sppo.command_line import refuse_ranks
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.storage import own_or_packaged


@dataclass(frozen=True, kw_only=True)
class Command(GenerateConfig):
    """The rollout job, and how to report it."""

    json: bool = False
    """Print the outcome as one JSON object."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Parse the command line, sample, report."""
    command = config.parse(Command, name=name, argv=argv, description=__doc__ or "")
    refuse_ranks(name)
    from megatron_sppo.conversion.complete import check_complete  # --help need not wait for it
    from megatron_sppo.rollout.generate import generate_rollouts

    if not command.servers.server:
        check_complete(Path(command.model))
    manifest = generate_rollouts(replace(command, prompts=own_or_packaged(command.prompts)))
    outcome = {
        "output": str(command.output),
        "num_prompts": manifest.num_prompts,
        "num_responses": manifest.num_responses,
        "num_shards": len(manifest.shards),
        "num_quarantined": len(manifest.quarantined),
        "outcomes": manifest.outcomes,
    }
    if command.json:
        print(json.dumps(outcome))
    else:
        print(
            f"{command.output}: {manifest.num_prompts} prompts x {outcome['num_responses']} responses in "
            f"{len(manifest.shards)} shards, {len(manifest.quarantined)} prompts set aside"
        )
    sys.stdout.flush()
