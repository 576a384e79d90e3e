"""What a tournament comes to under one judge: win rates, strengths, exploitability, circles, length control.

N = prompts, P = players, R = resamples
"""

import logging
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import torch

from megatron_sppo.errors import DataError
from megatron_sppo.evaluation.estimates import Resampling, estimate, mean_of
from megatron_sppo.evaluation.length_control import (
    GLM_NAMES,
    Comparisons,
    DifficultyTable,
    LengthModel,
    fit_length_control,
    is_extreme,
    refit_length_control,
)
from megatron_sppo.evaluation.players import Field
from megatron_sppo.evaluation.tournament import Tournament
from megatron_sppo.objective import duality_gap
from megatron_sppo.objective.hodge import hodge_split
from megatron_sppo.objective.strengths import bradley_terry

logger = logging.getLogger(__name__)

ELO_PER_NAT = 400 / np.log(10)
LENGTH_RESAMPLES = 200
"""At most: each is a regression."""


def standings(held: Tournament, field: Field, resampling: Resampling) -> dict[str, Any]:
    """Sum up one judge's verdicts -> the numbers of the result, each with its interval; all resamples are shared."""
    games_RPP = resampling.means(held.preference_NPP)
    game_PP = held.preference_NPP.mean(axis=0)
    a_a = {name: mean_of(held.a_a_NP[:, p], resampling, judge=held.judge) for p, name in enumerate(field.names)}

    def number(mean: float, values_R: np.ndarray) -> dict[str, Any]:
        count = len(held.prompt_ids)
        return estimate(mean, values_R, num_prompts=count, seed=resampling.seed, judge=held.judge)

    def win_rate(p: int, q: int) -> dict[str, Any]:
        rate = number(game_PP[p, q], games_RPP[:, p, q])
        return {"player": field.names[p], "opponent": field.names[q], **rate, "a_a": a_a[field.names[p]]}

    base = field.baseline
    return {
        "vs_baseline": [win_rate(p, base) for p in range(len(field.names)) if p != base],
        "win_rates": [win_rate(q, p) for p, q in combinations(range(len(field.names)), 2)],
        "matrix": {"players": field.names, "win_rate": game_PP.tolist()},
        "a_a": a_a,
        "bradley_terry": _strengths(held, field, game_PP, games_RPP, number),
        "exploitability": _exploitability(field, game_PP, games_RPP, number),
        "cycles": _cycles(held, field, resampling, number),
    }


def _strengths(
    held: Tournament, field: Field, game_PP: np.ndarray, games_RPP: np.ndarray, number: Any
) -> list[dict[str, Any]]:
    """Fit Bradley-Terry to the mean preferences -> a number a player, nats above the baseline, and as Elo."""
    strength_P = bradley_terry(torch.from_numpy(game_PP), anchor=field.baseline).numpy()
    strength_RP = bradley_terry(torch.from_numpy(games_RPP), anchor=field.baseline).numpy()
    if np.isnan(strength_P).any():
        logger.warning(
            "%s: there are no Bradley-Terry strengths, for some players never lose a single pair to the others.",
            held.judge,
        )
    rows = []
    for p, name in enumerate(field.names):
        strength = number(strength_P[p], strength_RP[:, p])
        elo = None if strength["mean"] is None else ELO_PER_NAT * strength["mean"]
        undefined = int(np.isnan(strength_RP[:, p]).sum())
        rows.append({"player": name, **strength, "elo": elo, "undefined_resamples": undefined})
    return rows


def _exploitability(field: Field, game_PP: np.ndarray, games_RPP: np.ndarray, number: Any) -> dict[str, Any]:
    """Compute the exact duality gap of each player, and of all in equal shares, in the game of the mean preferences."""
    game = torch.from_numpy(game_PP)
    policies = torch.cat([torch.eye(len(game)), torch.full((1, len(game)), 1 / len(game))]).double()
    gap = duality_gap(game, policies).numpy()
    gap_R = np.stack([duality_gap(torch.from_numpy(game_R), policies).numpy() for game_R in games_RPP])
    numbers = [number(gap[row], gap_R[:, row]) for row in range(len(policies))]
    pure = [{"player": name, **value} for name, value in zip(field.names, numbers, strict=False)]
    best = int(game_PP.mean(axis=1).argmax())
    return {"players": pure, "equal_shares": numbers[-1], "highest_mean_win_rate": field.names[best]}


def _cycles(held: Tournament, field: Field, resampling: Resampling, number: Any) -> dict[str, Any] | None:
    """Split the mean log-odds of players into a transitive and a cyclic part -> numbers, None of two players."""
    if len(field.names) < 3:
        return None
    flow_N = torch.from_numpy(held.flow_NPP)
    mean, resampled = flow_N.mean(dim=0), torch.from_numpy(resampling.means(held.flow_NPP))
    share, share_R = (_cyclic_share(flow).numpy() for flow in (mean, resampled))
    score, score_R = hodge_split(mean).score.numpy(), hodge_split(resampled).score.numpy()
    return {
        "cyclic_share": number(float(share), share_R),
        "transitive_share": number(1 - float(share), 1 - share_R),
        "cyclic_share_without_noise": cyclic_share_without_noise(flow_N),
        "scores": [{"player": name, **number(score[p], score_R[:, p])} for p, name in enumerate(field.names)],
    }


def _cyclic_share(flow: torch.Tensor) -> torch.Tensor:
    whole = flow.square().sum(dim=(-2, -1))
    return hodge_split(flow).cyclic.square().sum(dim=(-2, -1)) / torch.where(whole > 0, whole, torch.nan)


def cyclic_share_without_noise(flow_NPP: torch.Tensor) -> float | None:
    """Estimate the cyclic share of the expected flow -> number, None where it has no value; below 0 it is 0 by chance.

    The square of a mean over prompts is too large by the mean's variance. (|sum x|^2 - sum |x|^2) / (N (N - 1)), over
    pairs of different prompts, has no such bias.
    """
    count = len(flow_NPP)

    def energy(values: torch.Tensor) -> float:
        return float((values.sum(dim=0).square() - values.square().sum(dim=0)).sum()) / (count * (count - 1))

    if count < 2 or (whole := energy(flow_NPP)) <= 0:
        return None
    return energy(hodge_split(flow_NPP).cyclic) / whole


def length_controlled(
    held: Tournament,
    field: Field,
    resampling: Resampling,
    *,
    model: LengthModel,
    table: DifficultyTable | None,
    prompt_index: dict[str, int],
) -> list[dict[str, Any]]:
    """Fit AlpacaEval's regression for every player against the baseline -> a number each, or why there is none.

    Args:
        prompt_index: each prompt's row of the table.
    """
    rows = []
    index_N = np.array([prompt_index[prompt_id] for prompt_id in held.prompt_ids])
    for p, name in enumerate(field.names):
        if p == field.baseline:
            continue
        comparisons, prompt = held.against_baseline[p]
        if table is not None:
            comparisons = Comparisons(
                preference_N=comparisons.preference_N,
                delta_length_N=comparisons.delta_length_N,
                index_N=index_N[prompt],
            )
        row = {"player": name, "opponent": field.names[field.baseline], "regression": GLM_NAMES[model]}
        rows.append(row | _fit(held, comparisons, prompt, resampling, model=model, table=table))
    return rows


def _fit(
    held: Tournament,
    comparisons: Comparisons,
    prompt: np.ndarray,
    resampling: Resampling,
    *,
    model: LengthModel,
    table: DifficultyTable | None,
) -> dict[str, Any]:
    count = len(held.prompt_ids)
    try:
        fit = fit_length_control(comparisons, model=model, table=table)
    except DataError as error:
        nothing = estimate(np.nan, np.full(1, np.nan), num_prompts=count, seed=resampling.seed, judge=held.judge)
        return {**nothing, "reason": str(error)}
    fewer = Resampling(resamples=min(LENGTH_RESAMPLES, resampling.resamples), seed=resampling.seed)
    of_prompt = np.split(np.arange(len(prompt)), np.searchsorted(prompt, np.arange(1, count)))
    refits = [
        refit_length_control(
            comparisons.take(np.concatenate([of_prompt[row] for row in rows])),
            model=model,
            table=table,
            strength=fit.strength,
        )
        for rows in fewer.rows(count)
    ]
    value = estimate(fit.mean, np.array(refits), num_prompts=count, seed=resampling.seed, judge=held.judge)
    details = {key: item for key, item in asdict(fit).items() if key not in ("mean", "predictions_N")}
    extreme = is_extreme(float(comparisons.preference_N.mean()), fit.mean)
    return {**value, **details, "is_extreme": extreme, "num_pairs": len(prompt), "resamples": fewer.resamples}
