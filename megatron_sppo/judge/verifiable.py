"""Judges that check answers in place of reading them: `verifiable:ifeval`, `verifiable:math`, `python:FILE:FUNCTION`.

An answer's share s in [0, 1] is the mean of what it passes of its prompt's checks, and P_ij = 1/2 + (s_i - s_j) / 2:
draw one of the checks; the answer that passes it wins, two that pass or fail it alike share the win. So preferences are
graded and antisymmetric, equal shares are exact ties, and a win rate against a policy is 1/2 + half the difference of
the accuracies. The logit is that of P: L_ij = 2 artanh(s_i - s_j).

# K = responses per prompt, C = checks of a prompt
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.check_process import CheckProcess
from megatron_sppo.judge.checks import UncheckedAnswer
from megatron_sppo.judge.protocol import CERTAIN_LOGIT, Unjudged, Verdict, count_pairs, distinct
from megatron_sppo.storage import sha256_of_file

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

CHECKS_VERSION = 3
"""Raised when what is made of the checks changes: stored scores of another version are not resumed."""
KINDS = ("ifeval", "math")


def load_verifiable(name: str, *, seconds: float) -> CheckingJudge:
    """Load `verifiable:NAME` -> CheckingJudge.

    Raises:
        ConfigError: there is no such judge, or its library is not installed.
    """
    if name not in KINDS:
        raise ConfigError(f"--judge verifiable:{name} is unknown. Use verifiable:ifeval or verifiable:math.")
    process = CheckProcess(name, seconds=seconds)
    return CheckingJudge(process, name=f"verifiable:{name}", identity={"verifiable": name, "seconds": seconds})


def load_python(rest: str, *, seconds: float) -> CheckingJudge:
    """Load `python:FILE:FUNCTION`, a user's own scorer -> CheckingJudge.

    FUNCTION(answer, messages, columns) returns the answer's score, a number in [0, 1], or True or False.

    Raises:
        ConfigError: no such file or function, or the file cannot be imported.
    """
    file, _, function = rest.rpartition(":")
    path = Path(file)
    if not file or not function.isidentifier():
        raise ConfigError(f"--judge python:{rest} names no function. Use --judge python:FILE.py:FUNCTION.")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Give --judge python:FILE.py:FUNCTION the file of your scorer.")
    process = CheckProcess(f"{path.resolve()}:{function}", seconds=seconds)
    identity = {"python": sha256_of_file(path), "function": function, "seconds": seconds}
    return CheckingJudge(process, name=f"python:{path.name}:{function}", identity=identity)


class CheckingJudge:
    """Prefers the answer that passes more of its prompt's checks."""

    def __init__(self, process: CheckProcess, *, name: str, identity: dict[str, object]) -> None:
        self._process = process
        self.name = name
        self.fingerprint = sha256_of_json({**identity, "versions": process.versions, "version": CHECKS_VERSION})
        self.counts: Counter[str] = Counter()

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> list[Verdict]:
        """Check every different answer once -> float32 [K, K] a group, antisymmetric; or why there is none."""
        verdicts: list[Verdict] = []
        for group in groups:
            count_pairs(self.counts, distinct([response.text for response in group.responses])[1])
            passed = self.passed(group)
            verdicts.append(passed if isinstance(passed, Unjudged) else logits_of(passed.mean(axis=1)))
        return verdicts

    def passed(self, group: RolloutGroup) -> np.ndarray | Unjudged:
        """Check a group's answers -> float64 [K, C] in [0, 1], 1 where a check is passed; or why they cannot be."""
        texts, of_K = distinct([response.text for response in group.responses])
        try:
            passed_U = [self._process.check(text, list(group.messages), group.columns or {}) for text in texts]
        except UncheckedAnswer as reason:
            return Unjudged(reason=str(reason))
        return np.array(passed_U, dtype=np.float64)[of_K]


def logits_of(share_K: np.ndarray) -> np.ndarray:
    """Make logits of what each answer passes -> float32 [K, K]: L_ij = 2 artanh(s_i - s_j), whose sigmoid is P_ij."""
    difference_KK = share_K[:, None] - share_K[None, :]
    with np.errstate(divide="ignore"):  # all against nothing: P is 1
        logits_KK = 2 * np.arctanh(np.abs(difference_KK))
    return (np.sign(difference_KK) * np.minimum(logits_KK, CERTAIN_LOGIT)).astype(np.float32)
