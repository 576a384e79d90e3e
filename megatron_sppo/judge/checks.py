"""What a check of an answer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_sppo.rollout.records import Turn

Check = Callable[[str, list[Turn], dict[str, Any]], list[float]]
"""(answer, messages, columns) -> how far it passes each of its checks, in [0, 1]."""


class UncheckedAnswer(Exception):
    """Why an answer cannot be checked, as a clause."""


class RefusedChecks(Exception):
    """Why nothing can be checked at all, as a line with its remedy."""
