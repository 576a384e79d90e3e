"""Compare answers by a judge: a policy's with its base's and predecessor's, or all players' with each other."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sppo.command_line import refuse_ranks
from megatron_sppo.config import parse, to_dict
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
    refuse_ranks(name)
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
    from megatron_sppo.selfplay.summary import evaluation_metrics

    result = evaluate(config)
    return result, "\n".join(_lines(result)), evaluation_metrics(result)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """List the numbers within a result -> (path, value) pairs; a list's entries go by their player, judge or place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}/{key}")
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _numbers(item, f"{name}/{_title(item, place)}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


def _title(item: Any, place: int) -> str:
    """Name an entry of a list by its player and opponent, or its judge -> text."""
    whose = [item.get(key) for key in ("name", "player", "opponent")] if isinstance(item, dict) else []
    of_players = "_vs_".join(name for name in whose if isinstance(name, str))
    return of_players or (str(item.get("judge", place)) if isinstance(item, dict) else str(place))
