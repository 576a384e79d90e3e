"""What a setting may name: baselines, rules of preference. No torch here: command lines read these."""

import math
from typing import Literal, get_args

from megatron_sppo.errors import ConfigError

PreferenceRule = Literal["paper", "official"]
PREFERENCE_RULES: tuple[str, ...] = get_args(PreferenceRule)
BASELINES = ("half", "group_mean", "estimate")
"""The named baselines; the fourth is the tuple ("constant", c)."""

Baseline = str | tuple[str, float]

LARGEST_CONSTANT = 1e6
"""Of constant:C; log Z / eta is between 0 and 1 for win rates."""


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
