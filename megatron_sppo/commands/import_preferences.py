"""Preference data of other projects in, rollouts out: nothing is sampled or judged again.

Read are uclaml/SPPO's columns (generate_0 ... with probability or rm_scores; chosen, rejected, chosen_probs), TRL's
(prompt, chosen, rejected; plain or conversational), HH's, UltraFeedback's and Nectar's. The prompt is all that an
answer was given to. The ids are those of --model's chat template rendering the answered conversation; a row of which
that cannot be said is set aside with its reason.
Then: megatron-sppo score --rollouts OUTPUT --judge matrices:OUTPUT/matrices.jsonl --output DATASET
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sppo import config
from megatron_sppo.rollout.config import TemplateConfig


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to read, and for whom to tokenise it."""

    rows: Path
    """File (.jsonl, .json, .csv, .tsv, .parquet, plain or .gz, .zst) or dataset directory."""
    model: Path
    """Hugging Face directory of the policy to be trained: its tokenizer and chat template make the token ids."""
    output: Path
    """Directory of the rollouts; an older one is replaced when the new one is whole."""
    split: str | None = None
    """Rows of this split alone."""
    subset: str | None = None
    """The subset of a dataset directory that holds several."""
    shard_size: config.PositiveInt = 512
    """Prompts of a shard."""
    json: bool = False
    """Print the outcome as one JSON object."""
    template: TemplateConfig = field(default_factory=TemplateConfig)

    def __post_init__(self) -> None:
        config.check_ranges(self)


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Parse the command line, import, report."""
    command = config.parse(Command, name=name, argv=argv, description=__doc__ or "")
    from megatron_sppo.rollout.preferences import MATRICES_NAME, import_preferences  # --help need not wait for it

    manifest, counts = import_preferences(
        command.rows,
        model=command.model,
        output=command.output,
        split=command.split,
        subset=command.subset,
        shard_size=command.shard_size,
        template=command.template,
    )
    outcome: dict[str, Any] = {
        "output": str(command.output),
        "judge": f"matrices:{command.output / MATRICES_NAME}",
        "num_prompts": manifest.num_prompts,
        "num_responses": manifest.num_responses,
        "num_quarantined": len(manifest.quarantined),
        "counts": dict(sorted(counts.items())),
    }
    if command.json:
        print(json.dumps(outcome))
    else:
        described = ", ".join(f"{name} {count}" for name, count in outcome["counts"].items() if count)
        print(
            f"{command.output}: {manifest.num_prompts} prompts x {outcome['num_responses']} responses ({described}), "
            f"{len(manifest.quarantined)} rows set aside. Judge them with --judge {outcome['judge']}"
        )
    sys.stdout.flush()
