"""Mathematical answers against the right one, by Hugging Face's library `math-verify`."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re
from typing import Any

from math_verify import parse, verify

from megatron_sppo.judge.checks import UncheckedAnswer
from megatron_sppo.rollout.conversations import ANSWER_COLUMNS
from megatron_sppo.rollout.records import Turn

# math-verify warns of the alarms that are switched off here, and a crash would be told in these words.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX = re.compile(r"[\\^_{}]")
_NUMBER = re.compile(r"[-+]?[$\u20ac\u00a3]?(\d{1,3}(,\d{3})+|\d*)(\.\d+|(?<=\d)\.?)(/\d+)?\s?%?")
"""A number on its own: a decimal, a fraction, a share, a price."""
_CURRENCY = re.compile(r"[$\u20ac\u00a3]")
_MISREAD = re.compile(r"\d[ \t]+(\d|sqrt)|\d[eE][-+]?\d|(?<![A-Za-z])(pi|ln|log|sin|cos|tan|exp)\b")
"""What math-verify 0.9.0 takes for another number: 1 1/2 is 1, 1e5 is 5e; names are products of their letters."""
_PROSE = re.compile(r"(?<![A-Za-z])(?!(and|sqrt|infinity)\b)[A-Za-z]{3,}|\b[AaPp][Mm]\b")
"""Words, but those that math-verify knows between and in formulas."""


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
    # math-verify 0.9.0 finds no number behind an escaped sign of dollars in a sentence. Its own alarms would make a
    # slow answer a wrong one; CheckProcess ends what takes too long, and sets it aside.
    found = parse(answer.replace("\\$", ""), parsing_timeout=None)
    return [float(verify(list(gold), found, timeout_seconds=None))]


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

    Unmarked LaTeX and formulas are marked as such: bare, they would be read as one of their numbers (\frac{1}{2} as 1,
    6 - 5i as 5). Prose is not: its words would be read as products of their letters.
    """
    if _NUMBER.fullmatch(text):
        text = _CURRENCY.sub("", text)
    elif not ("$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text):
        is_latex = _LATEX.search(text) is not None
        if not is_latex and _MISREAD.search(text):
            return ()
        is_formula = re.search(r"[\d+*/=<>()-]", text) is not None
        if is_latex or (is_formula and not _PROSE.search(text)):
            text = f"${text}$"
    return tuple(parse(text, parsing_timeout=None))
