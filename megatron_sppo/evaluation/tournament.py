"""One judge's verdicts on all players' answers, each player against each, prompt by prompt.

N = prompts, P = players, M = a player's answers to a prompt
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sppo.errors import DataError
from megatron_sppo.evaluation.length_control import Comparisons
from megatron_sppo.evaluation.players import Field, Player
from megatron_sppo.judge.batches import Batch, judge_in_batches
from megatron_sppo.judge.conclusion import concluded
from megatron_sppo.judge.evaluation import count_cross_pairs, first_against_last
from megatron_sppo.judge.joined_groups import join_groups
from megatron_sppo.judge.protocol import Judge, Unjudged
from megatron_sppo.judge.workers import PooledJudge
from megatron_sppo.objective import preference_matrix
from megatron_sppo.rollout.records import RolloutGroup

logger = logging.getLogger(__name__)

_PROMPTS_PER_CALL = 16


@dataclass(frozen=True, kw_only=True)
class Tournament:
    """What one judge says of all players."""

    judge: str
    prompt_ids: tuple[str, ...]
    """[N], those that could be judged."""
    preference_NPP: np.ndarray
    """Mean P(p's answer > q's) over their pairs of answers; 1/2 on the diagonal."""
    flow_NPP: np.ndarray
    """Mean of half L_ij - L_ji over the same pairs, nats; 0 on the diagonal."""
    a_a_NP: np.ndarray
    """Mean P of a player's answers against its own of another seed; NaN where there are none."""
    against_baseline: tuple[tuple[Comparisons, np.ndarray], ...]
    """For each player its pairs with the baseline's answers, and the prompt of each, [pairs] in 0..N-1."""
    counts: Counter[str]
    unjudged: int


def shared_prompts(field: Field) -> list[str]:
    """Find the prompts that everybody answered -> their ids, in the baseline's order.

    Raises:
        DataError: there is none.
    """
    sides = list(_sides(field.players))
    shared = [prompt_id for prompt_id in field.players[field.baseline].groups if all(prompt_id in g for g in sides)]
    if not shared:
        raise DataError(
            f"there is no prompt that all of {', '.join(field.names)} answered. "
            "Sample all of them on the same held-out prompts."
        )
    if left_out := max(len(groups) for groups in sides) - len(shared):
        logger.warning("%d prompts that not everybody answered are left out; %d are left.", left_out, len(shared))
    return shared


@dataclass(frozen=True, kw_only=True)
class _Tables(Batch):
    """Some prompts, each with all sides' answers in one group."""

    tables: tuple[tuple[RolloutGroup, ...], ...]
    """The sides' groups of each prompt."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a worker does not need."""
        return vars(self) | {"tables": ()}


def _batches(field: Field, prompt_ids: Sequence[str]) -> Iterator[_Tables]:
    """Give out a few prompts at a time -> batches."""
    for index, start in enumerate(range(0, len(prompt_ids), _PROMPTS_PER_CALL)):
        part = prompt_ids[start : start + _PROMPTS_PER_CALL]
        tables = tuple(tuple(groups[prompt_id] for groups in _sides(field.players)) for prompt_id in part)
        yield _Tables(index=index, groups=tuple(reduce(join_groups, table) for table in tables), tables=tables)


def hold(
    judge: Judge | PooledJudge,
    field: Field,
    prompt_ids: Sequence[str],
    *,
    after: str | None = None,
    output: Path | None = None,
) -> Tournament:
    """Ask a judge about every pair of answers to every prompt, in both orders -> Tournament.

    Args:
        after: the text that the judge reads answers from; None: whole answers.
        output: as `judge_in_batches`.

    Raises:
        DataError: the same prompt_id has other messages with another player, or no prompt could be judged.
    """
    found: dict[str, _Round] = {}
    counts: Counter[str] = Counter()
    for tables, judged in judge_in_batches(judge, _batches(field, prompt_ids), total=len(prompt_ids), output=output):
        counts += judged.counts
        for group, table, verdict in zip(tables.groups, tables.tables, judged.verdicts, strict=True):
            if isinstance(verdict, Unjudged):
                logger.warning("prompt %s is left out: %s.", group.prompt_id, verdict.reason)
            else:
                seen = [concluded(side, after) for side in table]
                found[group.prompt_id] = _round(group.prompt_id, seen, verdict, field, counts)
    # In the prompts' order, whichever worker was first: the resampling draws by place.
    rounds = [found[prompt_id] for prompt_id in prompt_ids if prompt_id in found]
    if not rounds:
        raise DataError(f"{judge.name} could judge none of {len(prompt_ids)} prompts. The warnings above say why.")
    return _together(judge.name, field, rounds, counts, unjudged=len(prompt_ids) - len(rounds))


def _sides(players: Sequence[Player]) -> Iterator[Mapping[str, RolloutGroup]]:
    """Go through the players' answers, then through the second samplings -> mappings from prompt_id."""
    yield from (player.groups for player in players)
    yield from (player.second for player in players if player.second is not None)


@dataclass(frozen=True)
class _Round:
    """One prompt."""

    prompt_id: str
    preference_PP: np.ndarray
    flow_PP: np.ndarray
    a_a_P: np.ndarray
    pairs: tuple[tuple[np.ndarray, np.ndarray], ...]
    """For each player: P against the baseline's answers, and how much longer those are."""


def _round(
    prompt_id: str, table: Sequence[RolloutGroup], verdict: np.ndarray, field: Field, counts: Counter[str]
) -> _Round:
    """Cut the matrix of all answers into blocks of players -> _Round.

    Args:
        table: the sides' answers as the judge saw them.
    """
    players, logits = field.players, torch.as_tensor(verdict, dtype=torch.float64)
    preference = preference_matrix(logits)
    flow = ((logits - logits.T) / 2).numpy()
    ends = [0, *accumulate(len(group.responses) for group in table)]
    places = [slice(start, end) for start, end in pairwise(ends)]
    num_players = len(players)
    preference_PP, flow_PP = np.full((num_players, num_players), 0.5), np.zeros((num_players, num_players))
    for p, q in combinations(range(num_players), 2):
        block = preference[places[p], places[q]]
        preference_PP[p, q], flow_PP[p, q] = block.mean().item(), flow[places[p], places[q]].mean()
        preference_PP[q, p], flow_PP[q, p] = 1 - preference_PP[p, q], -flow_PP[p, q]
        there, back = logits[places[p], places[q]], logits[places[q], places[p]].T
        count_cross_pairs(counts, there, back, block, table[p], table[q])
    second = iter(places[num_players:])
    a_a = [
        _against_itself(preference, places[p], next(second) if player.second is not None else None)
        for p, player in enumerate(players)
    ]
    base = places[field.baseline]
    lengths = np.array([len(response.text) for group in table for response in group.responses])
    pairs = tuple(
        (preference[place, base].numpy().ravel(), (lengths[None, base] - lengths[place, None]).ravel())
        for place in places[:num_players]
    )
    return _Round(prompt_id, preference_PP, flow_PP, np.array(a_a), pairs)


def _against_itself(preference: torch.Tensor, place: slice, second: slice | None) -> float:
    """Compare a player's answers with its own of other seeds -> mean P, NaN of one answer.

    With a second sampling against that; without, the first half of the answers against the last.
    """
    return first_against_last(preference[place, place]) if second is None else preference[place, second].mean().item()


def _together(judge: str, field: Field, rounds: Sequence[_Round], counts: Counter[str], unjudged: int) -> Tournament:
    of_players = []
    for p in range(len(field.players)):
        pairs = [of_prompt.pairs[p] for of_prompt in rounds]
        prompt = np.repeat(np.arange(len(rounds)), [len(preference) for preference, _ in pairs])
        comparisons = Comparisons(
            preference_N=np.concatenate([preference for preference, _ in pairs]),
            delta_length_N=np.concatenate([delta for _, delta in pairs]),
        )
        of_players.append((comparisons, prompt))
    return Tournament(
        judge=judge,
        prompt_ids=tuple(of_prompt.prompt_id for of_prompt in rounds),
        preference_NPP=np.stack([of_prompt.preference_PP for of_prompt in rounds]),
        flow_NPP=np.stack([of_prompt.flow_PP for of_prompt in rounds]),
        a_a_NP=np.stack([of_prompt.a_a_P for of_prompt in rounds]),
        against_baseline=tuple(of_players),
        counts=counts,
        unjudged=unjudged,
    )
