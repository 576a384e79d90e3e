"""Over-optimisation: what the training judge gains over the iterations, against judges that training never asked.

Gao et al. 2023 (arXiv:2210.10760) plot both against the distance from the start; a gap that grows is Goodhart's.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron_sppo.evaluation.estimates import Resampling, mean_of
from megatron_sppo.evaluation.players import Field
from megatron_sppo.evaluation.tournament import Tournament


def over_optimisation(
    held: Sequence[Tournament],
    seen: Sequence[bool | None],
    field: Field,
    resampling: Resampling,
    *,
    distances: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Follow each run's iterates under each judge -> a curve a run, [] where no player is an iterate.

    `gap` is the mean win rate by judges that training saw less that by others, on the prompts that all of them judged.

    Args:
        distances: each player's KL to the baseline, where it was estimated.
    """
    curves = []
    for run in dict.fromkeys(player.run for player in field.players if player.run is not None):
        iterates = [p for p, player in enumerate(field.players) if player.run == run and player.iteration]
        points = [_point(held, seen, field, p, resampling) for p in iterates]
        for point in points:
            point["kl_to_baseline"] = distances.get(point["player"], {}).get("kl_to_baseline")
        curves.append({"run": run, "points": points})
    return curves


def _point(
    held: Sequence[Tournament], seen: Sequence[bool | None], field: Field, p: int, resampling: Resampling
) -> dict[str, Any]:
    by_prompt = [dict(zip(one.prompt_ids, one.preference_NPP[:, p, field.baseline], strict=True)) for one in held]
    rates = [
        {"seen": is_seen, **mean_of(np.array(list(rate.values())), resampling, judge=one.judge)}
        for one, rate, is_seen in zip(held, by_prompt, seen, strict=True)
    ]
    return {
        "player": field.names[p],
        "iteration": field.players[p].iteration,
        "win_rates": rates,
        "gap": _gap(held, by_prompt, seen, resampling),
    }


def _gap(
    held: Sequence[Tournament],
    by_prompt: Sequence[dict[str, float]],
    seen: Sequence[bool | None],
    resampling: Resampling,
) -> dict[str, Any] | None:
    """Average seen judges' win rates less unseen ones' over common prompts -> number, None where a kind is missing."""
    shared = [prompt_id for prompt_id in by_prompt[0] if all(prompt_id in rate for rate in by_prompt)]
    if not shared or not {True, False} <= set(seen):
        return None
    means, names = [], []
    for kind in (True, False):
        of_kind = [number for number, is_seen in enumerate(seen) if is_seen is kind]
        rates = [[by_prompt[number][prompt_id] for prompt_id in shared] for number in of_kind]
        means.append(np.mean(rates, axis=0))
        names.append(" and ".join(held[number].judge for number in of_kind))
    return mean_of(means[0] - means[1], resampling, judge=" less ".join(names))
