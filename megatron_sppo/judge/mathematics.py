"""Mathematical answers against the right one, by Hugging Face's library `math-verify`."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from typing import Any

from math_verify import parse, verify

from megatron_sppo.judge.checks import UncheckedAnswer
from megatron_sppo.rollout.conversations import ANSWER_COLUMNS
from megatron_sppo.rollout.records import Turn

_LATEX = re.compile(r"[\\^_{}]")


def versions() -> dict[str, str]:
    """Gather what decides a verdict -> {package: version}."""
    names = ("math-verify", "latex2sympy2_extended", "sympy")
    return {name: importlib.metadata.version(name) for name in names}


def check_mathematics(answer: str, messages: list[Turn], columns: dict[str, Any]) -> list[float]:
    """Compare the result that an answer gives with the right one -> [1] or [0]. An answer without any is wrong.

    Raises:
        UncheckedAnswer: the row has no right answer, or none that is mathematics.
    """
    gold = _parsed(right_answer(columns))
    if not gold:
        raise UncheckedAnswer(f"its right answer is not read as mathematics ({right_answer(columns)[:60]!r})")
    # math-verify 0.9.0 finds no number behind an escaped sign of dollars in a sentence.
    return [float(verify(list(gold), parse(answer.replace("\\$", ""))))]


def right_answer(columns: dict[str, Any]) -> str:
    """Find the right answer in the columns that published sets use -> text, as it stands.

    Raises:
        UncheckedAnswer: no such column.
    """
    for name in ANSWER_COLUMNS:
        value = columns.get(name)
        if isinstance(value, dict):  # verl's reward_model
            value = value.get("ground_truth")
        if isinstance(value, list) and len(value) == 1:  # Olympiad sets list their final answers
            value = value[0]
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            # GSM8K: the way to the answer, then "#### 72".
            return str(value).rpartition("####")[2].strip()
    raise UncheckedAnswer(
        f"its prompt has none of the columns {', '.join(ANSWER_COLUMNS)}, which verifiable:math checks answers by"
    )


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> tuple[Any, ...]:
    r"""Parse a right answer -> what math-verify makes of it, () where it is no mathematics.

    LaTeX is read only where it is marked as such: a bare \frac{1}{2} would be read as the number 1. Words marked so
    would be read as products of their letters.
    """
    is_marked = "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text
    bare_latex = not is_marked and _LATEX.search(text) is not None
    is_formula = re.search(r"[\d+*/=<>()-]", text) is not None
    ways = (f"${text}$", text) if bare_latex else (text, f"${text}$") if is_formula else (text,)
    return next((tuple(found) for way in ways if (found := parse(way))), ())
