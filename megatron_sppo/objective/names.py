"""What a setting may name: objectives, baselines, rules of preference. No torch here: command lines read these."""

import math
from dataclasses import dataclass

from megatron_sppo.errors import ConfigError

PREFERENCE_RULES = ("paper", "official")
BASELINES = ("half", "group_mean", "estimate")
"""The named baselines; the fourth is the tuple ("constant", c)."""

Baseline = str | tuple[str, float]

LARGEST_CONSTANT = 1e6
"""Of constant:C; log Z / eta is between 0 and 1 for win rates."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an objective asks of the data and of the batching."""

    name: str
    needs_pairs: bool
    """Trains on (winner, loser) pairs of a prompt, not on any number of its responses."""
    coupled: bool
    """One loss value joins the two responses of a pair, so that both must lie in one micro-batch."""
    strength: str
    """The setting that scales it: "eta" or "beta"."""
    target: str | None
    """What the regression target is made from: "win_rate", "preference" or "label"; None where there is no target."""
    weight: float = 1.0
    """Factor on each response's square; see `objective_loss`."""


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(name="sppo", needs_pairs=False, coupled=False, strength="eta", target="win_rate"),
        Objective(name="sppo_single", needs_pairs=True, coupled=False, strength="eta", target="preference"),
        Objective(name="sppo_hard", needs_pairs=True, coupled=False, strength="eta", target="label", weight=2.0),
        Objective(name="dpo", needs_pairs=True, coupled=True, strength="beta", target=None),
        Objective(name="ipo", needs_pairs=True, coupled=True, strength="beta", target=None),
    )
}


def find_objective(name: str) -> Objective:
    """Look an objective up -> its row of the table. There is no fall-back.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown. Use --objective with one of: {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]


def parse_baseline(text: str) -> Baseline:
    """Read "half", "group_mean", "estimate" or "constant:C" -> the name, or ("constant", C).

    Raises:
        ConfigError: anything else.
    """
    if text in BASELINES:
        return text
    name, colon, number = text.partition(":")
    try:
        value = float(number) if name == "constant" and colon else math.nan
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST_CONSTANT:  # NaN is at most nothing
        raise ConfigError(
            f"baseline {text!r} is unknown. Use half, group_mean, estimate or constant:C with C from "
            f"-{LARGEST_CONSTANT:.0f} to {LARGEST_CONSTANT:.0f}, e.g. constant:0.5."
        )
    return ("constant", value)
