"""Compare answers by a judge: a policy's with its base's and predecessor's, or all players' with each other."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sppo.config import parse, to_dict
from megatron_sppo.judge.config import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class Command(EvaluateConfig):
    """The comparison, and how to report it."""

    json: bool = False
    """Print the result, without its prompts, as one JSON object."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Evaluate and print the win rates, or the players' tables."""
    config = parse(Command, name=name, argv=argv, description=__doc__ or "")
    from megatron_sppo.tracking.run import start

    with start(
        config.tracking, directory=config.output.parent, kind="evaluate", settings=to_dict(config), keeps_id=False
    ) as tracked:
        result, text, metrics = _evaluate(config)
        tracked.log(1, metrics)
        tracked.attach(config.output)
    print(json.dumps({key: value for key, value in result.items() if key != "prompts"}) if config.json else text)


def _evaluate(config: EvaluateConfig) -> tuple[dict[str, Any], str, dict[str, float]]:
    """Evaluate -> (result, the same as text, what trackers are told of it)."""
    if config.is_tournament:
        from megatron_sppo.evaluation.kit import evaluate_players  # brings torch, which --help need not wait for
        from megatron_sppo.evaluation.text import tournament_text

        result = evaluate_players(config)
        parts = {name: result[name] for name in ("players", "judges")}
        return result, tournament_text(result), dict(_numbers(parts, "evaluation"))
    from megatron_sppo.judge.evaluation import evaluate
    from megatron_sppo.selfplay.summary import evaluation_metrics, rate_text

    result = evaluate(config)
    lines = []
    for other in ("base", "previous"):
        rate = result[f"win_rate_vs_{other}"]
        prompts = f"on {rate['num_prompts']} prompts, by {result['judge']}"
        lines.append(f"win rate against {other:8}  {rate_text(rate)}  {prompts}")
    return result, "\n".join(lines), evaluation_metrics(result)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """List the numbers within a result -> (path, value) pairs; a list's entries go by their name, or their place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}/{key}")
    elif isinstance(value, list):
        for place, item in enumerate(value):
            title = item.get("name", item.get("judge", place)) if isinstance(item, dict) else place
            yield from _numbers(item, f"{name}/{title}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)
