"""Prompt groups in the form in which a dataset's files hold them: checked and encoded once, then only joined.

Whoever judges a group encodes it, so that the one process that writes the dataset copies bytes. A block is as large as
its maker likes: the same groups in the same order give the same files.

# G = groups, K = responses per prompt
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sppo.objective import preference_matrix, win_rates

TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class GroupBlock:
    """G prompt groups, ready for the files of a dataset."""

    tokens: np.ndarray
    """int32: prompt, response 1 .. response K of each group, end to end."""
    lengths: np.ndarray
    """[G, K + 1] int32, tokens of each."""
    win_rates: np.ndarray
    """[G, K] float32."""
    preferences: np.ndarray
    """[G, K, K] float32."""
    judge_logits: np.ndarray
    """[G, K, K] float32, the diagonal 0."""
    lines: bytes
    """Of prompts.jsonl, one a group."""
    line_bytes: np.ndarray
    """[G] int64, bytes of each line, its end included."""

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.lengths)

    def only(self, kept_G: np.ndarray) -> "GroupBlock":
        """Leave groups out -> a block of those that are kept; the block itself where all are.

        Args:
            kept_G: bool.
        """
        if kept_G.all():
            return self
        lines = np.frombuffer(self.lines, dtype=np.uint8)
        return GroupBlock(
            tokens=self.tokens[np.repeat(kept_G, self.lengths.sum(axis=1))],
            lengths=self.lengths[kept_G],
            win_rates=self.win_rates[kept_G],
            preferences=self.preferences[kept_G],
            judge_logits=self.judge_logits[kept_G],
            lines=lines[np.repeat(kept_G, self.line_bytes)].tobytes(),
            line_bytes=self.line_bytes[kept_G],
        )


class GroupEncoder:
    """Turns prompt groups into blocks. A group that cannot be trained on is refused with its reason, never fatal."""

    def __init__(self, *, num_responses: int, vocab_size: int | None, rule: str) -> None:
        """Set what every group must agree with.

        Args:
            vocab_size: every token id must be below it; None: below 2^31.
            rule: makes preferences of judge logits.
        """
        self._num_responses, self._vocab_size, self._rule = num_responses, vocab_size, rule
        self._limit = np.iinfo(np.int32).max if vocab_size is None else vocab_size - 1
        self._groups: list[tuple[np.ndarray, list[int], np.ndarray, bytes]] = []

    def add(
        self,
        prompt_token_ids: TokenIds,
        response_token_ids: Sequence[TokenIds],
        judge_logits: np.ndarray,
        *,
        prompt_id: str,
        info: dict[str, Any],
    ) -> str | None:
        """Encode one group into the next block -> None, or one clause on why it cannot be trained on.

        Args:
            judge_logits: [K, K], entry [i, j] the logit of "i, shown first, beats j"; the diagonal is not read.
            info: more JSON for the group's line in prompts.jsonl.
        """
        logits = np.array(judge_logits, dtype=np.float32)
        if logits.ndim == 2:
            np.fill_diagonal(logits, 0.0)
        sequences = [prompt_token_ids, *response_token_ids]
        if (fault := self._fault(sequences, logits)) is not None:
            return fault
        tokens = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
        if (low := tokens.min()) < 0 or tokens.max() > self._limit:
            return f"token id {low if low < 0 else tokens.max()} lies outside the vocabulary of {self._vocab_size}"
        line = json.dumps({"prompt_id": prompt_id, **info}, sort_keys=True, ensure_ascii=True) + "\n"
        lengths = [len(sequence) for sequence in sequences]
        self._groups.append((tokens.astype(np.int32), lengths, logits, line.encode("ascii")))
        return None

    def take(self) -> GroupBlock:
        """Join what was added since the last time -> one block."""
        groups, self._groups = self._groups, []
        tokens, lengths, logits, lines = zip(*groups, strict=True) if groups else ((),) * 4
        num_responses = self._num_responses
        logits_GKK = np.array(logits, dtype=np.float32).reshape(-1, num_responses, num_responses)
        rates, preferences = targets_of(logits_GKK, rule=self._rule)
        return GroupBlock(
            tokens=np.concatenate([np.empty(0, dtype=np.int32), *tokens]),
            lengths=np.array(lengths, dtype=np.int32).reshape(-1, num_responses + 1),
            win_rates=rates,
            preferences=preferences,
            judge_logits=logits_GKK,
            lines=b"".join(lines),
            line_bytes=np.array([len(line) for line in lines], dtype=np.int64),
        )

    def _fault(self, sequences: Sequence[TokenIds], logits: np.ndarray) -> str | None:
        """Say what is wrong with a group's shape or its logits -> one clause, or None."""
        prompt, responses = sequences[0], sequences[1:]
        if len(responses) != self._num_responses:
            return f"{len(responses)} responses, expected {self._num_responses}"
        if len(prompt) == 0:
            return "the prompt has no tokens"
        if empty := [k for k, response in enumerate(responses) if len(response) == 0]:
            return f"responses {empty} have no tokens"
        if logits.shape != (self._num_responses, self._num_responses):
            return f"judge logits have shape {list(logits.shape)}, expected {[self._num_responses] * 2}"
        if not np.isfinite(logits).all():
            return "judge logits are not finite"
        return None


def targets_of(judge_logits_GKK: np.ndarray, *, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Make win rates and preferences of logits -> ([G, K] float32, [G, K, K] float32).

    One group at a time: torch counts in vectors of eight and rounds what is left over otherwise, so that a group's
    numbers would depend on how many others are computed beside it.
    """
    rates, preferences = np.empty(judge_logits_GKK.shape[:2], np.float32), np.empty_like(judge_logits_GKK)
    for group, logits_KK in enumerate(torch.from_numpy(judge_logits_GKK)):
        preferences_KK = preference_matrix(logits_KK, rule=rule)
        rates[group], preferences[group] = win_rates(preferences_KK), preferences_KK
    return rates, preferences
