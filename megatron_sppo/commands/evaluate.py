"""Compare answers by a judge: a policy's with its base's and predecessor's, or all players' with each other."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sppo.config import parse
from megatron_sppo.judge.config import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class Command(EvaluateConfig):
    """The comparison, and how to report it."""

    json: bool = False
    """Print the result, without its prompts, as one JSON object."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Evaluate and print the win rates, or the players' tables."""
    config = parse(Command, name=name, argv=argv, description=__doc__ or "")
    if config.is_tournament:
        from megatron_sppo.evaluation.kit import evaluate_players  # brings torch, which --help need not wait for
        from megatron_sppo.evaluation.text import tournament_text

        result = evaluate_players(config)
        text = tournament_text(result)
    else:
        from megatron_sppo.judge.evaluation import evaluate
        from megatron_sppo.selfplay.summary import rate_text

        result = evaluate(config)
        lines = []
        for other in ("base", "previous"):
            rate = result[f"win_rate_vs_{other}"]
            prompts = f"on {rate['num_prompts']} prompts, by {result['judge']}"
            lines.append(f"win rate against {other:8}  {rate_text(rate)}  {prompts}")
        text = "\n".join(lines)
    print(json.dumps({key: value for key, value in result.items() if key != "prompts"}) if config.json else text)
