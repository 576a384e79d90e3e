"""Which responses are trained on, in which pairs, and towards which targets.

N = training rows (a row is one response of one prompt group), G = prompt groups, K = responses per prompt.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.schema import Selection, parse_selection
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.objective import Targets, log_partition
from megatron_sppo.objective.names import Baseline

TIE_DECIMALS = 6
"""Win rates that agree to this many decimals are tied: the rounding of float32 means must not pick a winner."""


@dataclass(frozen=True, kw_only=True)
class TrainingIndex:
    """The rows of one epoch in file order. With pairs, rows 2p and 2p + 1 are the winner and the loser of pair p."""

    group: np.ndarray
    """[N] int64, prompt group of the row."""
    response: np.ndarray
    """[N] int64, which of the group's K responses."""
    prompt_lengths: np.ndarray
    """[N] int64, tokens, after `max_prompt_length`."""
    response_lengths: np.ndarray
    """[N] int64, tokens."""
    pairs: bool
    num_dropped_ties: int = 0
    """Prompt groups left out because all their win rates are tied."""
    num_tied_pairs: int = 0
    """Pairs left out, in groups that are not all tied, because their two win rates are."""
    num_too_long: int = 0
    """Rows left out because prompt and response exceed the sequence length; with pairs, the partner's row too."""

    @property
    def num_rows(self) -> int:
        """N, the number of training rows."""
        return len(self.group)

    @property
    def rows_per_pair(self) -> int:
        """Rows that follow each other in every order: 2, winner and loser; 1 without pairs."""
        return 2 if self.pairs else 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[N] int64, tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths


def training_index(
    dataset: PreferenceDataset,
    selection: str | Selection,
    *,
    pairs: bool,
    seq_length: int | None = None,
    max_prompt_length: int | None = None,
) -> TrainingIndex:
    """List the rows to train on -> TrainingIndex.

    - "all": every response; with pairs, every pair of responses of a prompt that is not tied (K (K - 1) / 2 at most).
    - "extremes": best and worst win rate, the winner first. The same as "top-bottom:1".
    - "top-bottom:M": the M best and the M worst; with pairs, best with worst, second best with second worst, and so on.

    Ties go to the lowest response index. Groups tied throughout carry no order: dropped and counted, except under "all"
    without pairs, where a tie is a target like any other.

    Args:
        seq_length: rows above this many tokens are left out and counted; None: no limit.
        max_prompt_length: cut longer prompts, keeping their end (the official recipe's 512); None: cut nothing.

    Raises:
        ConfigError: the selection needs more responses than there are.
        DataError: no row is left.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ConfigError(f"max_prompt_length ({max_prompt_length} tokens) keeps nothing of a prompt. Use 1 or more.")
    selection = parse_selection(selection) if isinstance(selection, str) else selection
    rate_GK = np.round(dataset.all_win_rates().astype(np.float64), TIE_DECIMALS)
    num_responses = rate_GK.shape[1]
    if 2 * selection.num_each > num_responses or (pairs and num_responses < 2):
        raise ConfigError(
            f"selection {selection} needs {max(2 * selection.num_each, 2)} responses a prompt, the dataset has "
            f"{num_responses}. Use another --selection or score rollouts with more --num-responses."
        )
    tied_G = rate_GK.max(axis=1) == rate_GK.min(axis=1)
    drops_ties = pairs or selection.kind != "all"
    num_dropped_ties = int(tied_G.sum()) if drops_ties else 0
    kept = np.flatnonzero(~tied_G) if drops_ties else np.arange(len(rate_GK))
    # [kept groups, units per group, rows per unit] of response indices.
    units = _units(rate_GK[kept], selection, pairs=pairs)
    group = np.broadcast_to(kept[:, None, None], units.shape).reshape(-1, units.shape[2])
    units = units.reshape(group.shape)
    num_tied_pairs = 0
    if pairs:
        untied = rate_GK[group[:, 0], units[:, 0]] > rate_GK[group[:, 1], units[:, 1]]
        num_tied_pairs = int((~untied).sum())
        group, units = group[untied], units[untied]
    prompt_lengths = dataset.prompt_lengths[group].astype(np.int64)
    if max_prompt_length is not None:
        prompt_lengths = np.minimum(prompt_lengths, max_prompt_length)
    response_lengths = dataset.response_lengths[group, units].astype(np.int64)
    fits = np.ones(len(group), dtype=bool)
    if seq_length is not None:
        fits = (prompt_lengths + response_lengths <= seq_length).all(axis=1)
    if not fits.any():
        raise DataError(
            f"{dataset.directory} has no row to train on under selection {selection}: {num_dropped_ties} groups are "
            f"tied, {fits.size * units.shape[1]} rows are longer than {seq_length} tokens. "
            "Use --selection all or a larger --seq-length."
        )
    group, units = group[fits], units[fits]
    return TrainingIndex(
        group=group.reshape(-1),
        response=units.reshape(-1),
        prompt_lengths=prompt_lengths[fits].reshape(-1),
        response_lengths=response_lengths[fits].reshape(-1),
        pairs=pairs,
        num_dropped_ties=num_dropped_ties,
        num_tied_pairs=num_tied_pairs,
        num_too_long=int((~fits).sum()) * units.shape[1],
    )


def _units(rate_GK: np.ndarray, selection: Selection, *, pairs: bool) -> np.ndarray:
    """Choose responses per group -> [G, units, rows per unit] response indices, winners first in pairs."""
    num_groups, num_responses = rate_GK.shape
    if selection.kind == "all":
        if not pairs:
            return np.broadcast_to(np.arange(num_responses)[None, :, None], (num_groups, num_responses, 1))
        first, second = np.triu_indices(num_responses, k=1)
        swap = rate_GK[:, second] > rate_GK[:, first]
        return np.stack([np.where(swap, second, first), np.where(swap, first, second)], axis=2)
    num_each = selection.num_each
    best = np.argsort(-rate_GK, axis=1, kind="stable")[:, :num_each]
    # A partly tied group must not put one response at both ends.
    rest = rate_GK.copy()
    np.put_along_axis(rest, best, np.inf, axis=1)
    worst = np.argsort(rest, axis=1, kind="stable")[:, :num_each]
    # Winner, loser, winner, loser: also without pairs, so that both selections list the same rows in the same order.
    both = np.stack([best, worst], axis=2)
    return both if pairs else both.reshape(num_groups, 2 * num_each, 1)


def row_targets(
    dataset: PreferenceDataset, index: TrainingIndex, *, eta: float, baseline: Baseline = "half"
) -> Targets:
    """Gather what each row's loss is made from, but for log pi_t, which is NaN -> Targets of [N].

    Args:
        eta: nats per unit of preference.
        baseline: see `objective.log_partition`; taken over all K responses of the row's prompt.
    """
    rate_GK = torch.from_numpy(dataset.all_win_rates())
    win_rate = rate_GK[index.group, index.response]
    unknown = torch.full_like(win_rate, torch.nan)
    preference, chosen = unknown, win_rate > 0.5
    if index.pairs:
        partner = index.response.reshape(-1, 2)[:, ::-1].reshape(-1)
        preference = torch.from_numpy(dataset.all_preferences()[index.group, index.response, partner])
        chosen = torch.arange(index.num_rows) % 2 == 0
    return Targets(
        win_rate=win_rate,
        log_z=log_partition(rate_GK, eta=eta, baseline=baseline)[index.group],
        preference=preference,
        chosen=chosen,
        reference_log_prob=unknown,
    )
