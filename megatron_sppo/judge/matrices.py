"""Preferences that somebody else has computed, as a judge: `matrices:FILE`, JSON Lines with one matrix a prompt.

A line is {"prompt_id", "judge_logits": K x K} or {"prompt_id", "preferences": K x K}, all lines of one kind. Logits are
raw, "i shown first beats j", and serve both presets. Preferences are P_ij with P_ij + P_ji = 1: what a rule has already
made of logits, so that they are kept as they are, under the paper's rule.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import sha256_of_json, unsealed
from megatron_sppo.judge.protocol import CERTAIN_LOGIT, LARGEST_LOGIT, Unjudged, Verdict, count_pairs, distinct
from megatron_sppo.rollout.preferences import SUM_TOLERANCE

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

KINDS = ("preferences", "judge_logits")
GIVEN_LOGITS, GIVEN_PREFERENCES = "given_logits", "given_preferences"
"""Counts of matrices, by what their file holds: diagnostics.json says by them what else a dataset may become."""


class MatricesJudge:
    """Looks matrices up by prompt_id. A prompt without one is set aside, and counted."""

    def __init__(self, file: str, *, rule: str) -> None:
        """Read the file.

        Raises:
            ConfigError: preferences, where the official rule is to make them of logits.
            DataError: no such file, or a line that is no square matrix of finite numbers.
        """
        path = Path(file)
        self._matrices, kinds, sha256 = _read(path)
        self._given = GIVEN_LOGITS if kinds == {"judge_logits"} else GIVEN_PREFERENCES
        if self._given == GIVEN_PREFERENCES and rule == "official":
            raise ConfigError(
                f"{path} holds preferences; the official rule is made of judge logits. "
                "Use --preset paper, which keeps them as they are."
            )
        self.name = f"matrices:{path.name}"
        self.fingerprint = sha256_of_json({"matrices": sha256})
        self.counts: Counter[str] = Counter()

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Look every group up -> float32 [K, K] a group, unless the file has no matrix of that size."""
        return [self._matrix(group) for group in groups]

    def _matrix(self, group: RolloutGroup) -> Verdict:
        num_responses = len(group.responses)
        _, of_K = distinct([response.text for response in group.responses])
        count_pairs(self.counts, of_K)
        matrix = self._matrices.get(group.prompt_id)
        if matrix is None or len(matrix) != num_responses:
            self.counts["missing_matrices"] += 1
            found = "no matrix" if matrix is None else f"a matrix of {len(matrix)} responses"
            return Unjudged(
                reason=f"the file of matrices has {found} for it, it has {num_responses} responses: give matrices:FILE "
                "of these very rollouts"
            )
        self.counts[self._given] += 1
        text_K = np.array(of_K)
        return np.where(text_K[:, None] == text_K[None, :], np.float32(0), matrix)


def _read(path: Path) -> tuple[dict[str, np.ndarray], set[str], str]:
    """Read a file of matrices, once -> (float32 logits by prompt_id, the kinds that occur, the file's sha256)."""
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give matrices:FILE, as `megatron-sppo import-preferences` writes it.")
    matrices: dict[str, np.ndarray] = {}
    kinds: set[str] = set()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if not line.strip():
                continue
            try:
                row = msgspec.convert(unsealed(json.loads(line), place="its line"), _Line)
                prompt_id, (kind, matrix) = str(row.prompt_id), row.logits()
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise DataError(
                    f"{path}, line {number} is no matrix ({reason}). "
                    'Write {"prompt_id": ..., "judge_logits": [[...]]} a line.'
                ) from None
            if matrices.setdefault(prompt_id, matrix) is not matrix:
                raise DataError(f"{path}, line {number}: the prompt_id {prompt_id!r} occurs twice. Keep one of them.")
            kinds.add(kind)
    if not matrices:
        raise DataError(f"{path} holds no matrix. Write a line for each prompt.")
    return matrices, kinds, digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One prompt's line: one of the two matrices."""

    prompt_id: str | int
    judge_logits: list[list[float | None]] | None = None
    """A diagonal may hold anything, nulls too: it is not read."""
    preferences: list[list[float | None]] | None = None

    def logits(self) -> tuple[str, np.ndarray]:
        """Make logits of the matrix that is there -> (its kind, float32 [K, K]).

        Raises:
            ValueError: says what is wrong with it.
        """
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "neither " + " nor ".join(KINDS)
            raise ValueError(f"it holds {found}, of which one is needed")
        return kinds[0], as_logits(getattr(self, kinds[0]), kinds[0])


def as_logits(values: Any, kind: str) -> np.ndarray:
    """Check a matrix and turn preferences into logits -> float32 [K, K], the diagonal 0.

    Raises:
        ValueError: not square, not finite, or no preferences.
    """
    matrix = np.array(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"the shape {matrix.shape} is not K x K")
    np.fill_diagonal(matrix, 0.5 if kind == "preferences" else 0.0)
    if not np.isfinite(matrix).all():
        raise ValueError("a value is not finite")
    if kind == "preferences":
        if matrix.min() < 0 or matrix.max() > 1 or np.abs(matrix + matrix.T - 1).max() > SUM_TOLERANCE:
            raise ValueError("P_ij + P_ji is not 1, or a P lies outside [0, 1]")
        floor = 1 / (1 + np.exp(CERTAIN_LOGIT))
        matrix = np.clip((matrix + 1 - matrix.T) / 2, floor, 1 - floor)
        matrix = np.log(matrix / (1 - matrix))
    if np.abs(matrix).max() > LARGEST_LOGIT:
        raise ValueError(f"a logit lies beyond {LARGEST_LOGIT:.0e} nats")
    return matrix.astype(np.float32)
