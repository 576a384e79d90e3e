"""Compare a policy's answers with the base's and the previous policy's, by a judge."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sppo.config import parse, to_dict
from megatron_sppo.judge.config import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class Command(EvaluateConfig):
    """The comparison, and how to report it."""

    json: bool = False
    """Print the result, without its prompts, as one JSON object."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Evaluate and print both win rates."""
    config = parse(Command, name=name, argv=argv, description=__doc__ or "")
    from megatron_sppo.judge.evaluation import evaluate  # brings torch, which --help need not wait for
    from megatron_sppo.selfplay.summary import evaluation_metrics, rate_text
    from megatron_sppo.tracking.run import start

    settings = to_dict(config)
    with start(
        config.tracking, directory=config.output.parent, kind="evaluate", settings=settings, keeps_id=False
    ) as tracked:
        result = evaluate(config)
        tracked.log(1, evaluation_metrics(result))
        tracked.attach(config.output)
    if config.json:
        print(json.dumps({key: value for key, value in result.items() if key != "prompts"}))
        return
    for other in ("base", "previous"):
        rate = result[f"win_rate_vs_{other}"]
        print(f"win rate against {other:8}  {rate_text(rate)}  on {rate['num_prompts']} prompts, by {result['judge']}")
