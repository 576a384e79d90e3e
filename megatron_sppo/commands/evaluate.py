#!/usr/bin/env python3
"""Compare a policy's answers with the base's and the previous policy's, by a judge."""

import json
from dataclasses import dataclass

from megatron_sppo.config import parse
from megatron_sppo.judge.config import EvaluateConfig

NAME = "evaluate.py"


@dataclass(frozen=True, kw_only=True)
class Command(EvaluateConfig):
    """The comparison, and how to report it."""

    json: bool = False
    """Print the result, without its prompts, as one JSON object."""


def main() -> None:
    """Evaluate and print both win rates."""
    config = parse(Command, name=NAME, description=str(__doc__))
    from megatron_sppo.judge.evaluation import evaluate  # brings torch, which --help need not wait for
    from megatron_sppo.selfplay.summary import rate_text

    result = evaluate(config)
    if config.json:
        print(json.dumps({name: value for name, value in result.items() if name != "prompts"}))
        return
    for name in ("base", "previous"):
        rate = result[f"win_rate_vs_{name}"]
        print(f"win rate against {name:8}  {rate_text(rate)}  on {rate['num_prompts']} prompts, by {result['judge']}")
