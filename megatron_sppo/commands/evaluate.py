"""Compare answers by a judge: a policy's with its base's and predecessor's, or all players' with each other."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sppo.config import parse
from megatron_sppo.judge.config import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class Command(EvaluateConfig):
    """The comparison, and how to report it."""

    json: bool = False
    """Print the result, without its prompts, as one JSON object."""


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """Spell a policy's win rates, its noise floor beside each, and what it holds of what it was asked for -> lines."""
    from megatron_sppo.selfplay.summary import rate_text

    floor = f"  (A/A {rate_text(result['a_a'])})" if result["a_a"] else ""
    for other in ("base", "previous"):
        rate = result[f"win_rate_vs_{other}"]
        prompts = f"on {rate['num_prompts']} prompts, by {result['judge']}"
        yield f"win rate against {other:8}  {rate_text(rate)}  {prompts}{floor}"
    for name, accuracy in result.get("accuracy", {}).items():
        if accuracy is not None:
            prompts, instructions = (rate_text(accuracy[f"{level}_level"]) for level in ("prompt", "instruction"))
            yield f"strict accuracy of {name:8}  prompts {prompts}, instructions {instructions}"


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

        result = evaluate(config)
        text = "\n".join(_lines(result))
    print(json.dumps({key: value for key, value in result.items() if key != "prompts"}) if config.json else text)
