"""Show, token by token, how a policy differs from the one that it was trained from: log pi_theta/pi_t (equation 3.11).

    megatron-sppo inspect --load SAVE --reference PI_T --data DATASET --output token_log_ratios.jsonl

Every setting of examples/pretrain_sppo.py is taken, so that --config SAVE/config.yaml repeats the training's precision
and packing; under torchrun also its layout.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sppo.config import parse
from megatron_sppo.training.config import InspectionConfig


@dataclass(frozen=True, kw_only=True)
class Command(InspectionConfig):
    """What to compare, and how to report it."""

    json: bool = False
    """Print the summary as one JSON object."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Write the log-ratios, and say on rank 0 what was written."""
    config = parse(Command, name=name, argv=argv, description=__doc__ or "")
    from megatron_sppo.training import parallel  # brings torch, which --help need not wait for
    from megatron_sppo.training.inspection import inspect

    summary = inspect(config)
    if not parallel.is_rank_zero():
        return
    if config.json:
        print(json.dumps(summary))
        return
    print(f"{summary['output']}: {summary['num_responses']} responses to {summary['num_prompts']} prompts")
    print(
        f"|log pi_theta/pi_t|, nats: {summary['abs_log_ratio_per_token']:.4g} a token, "
        f"{summary['abs_log_ratio_per_response']:.4g} a response"
    )
