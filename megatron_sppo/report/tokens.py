"""Answers as coloured text in the report: which tokens an iteration made more likely, and which less."""

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.errors import DataError

NUM_SHOWN = 4
"""Prompts whose best and worst answer are shown."""

_FULL_COLOUR_QUANTILE = 0.95
_MORE, _LESS = (37, 99, 168), (204, 85, 34)
"""Blue and orange: apart for every kind of colour blindness."""
_STRONGEST = 0.75

CSS = """
.tokens span { border-radius: 2px; } .tokens { line-height: 1.9; }
.scale { display: flex; gap: 10px; align-items: center; margin: 0 0 14px; font-size: 13px; color: var(--muted); }
.scale i { display: inline-block; width: 180px; height: 12px; border-radius: 3px; border: 1px solid var(--line); }
"""


@dataclass(frozen=True, kw_only=True)
class TokenAnswer:
    """One answer with the log-ratio of each of its tokens."""

    group: int
    prompt_id: str
    win_rate: float
    log_ratio: float
    """Of the whole answer, nats."""
    texts: tuple[str, ...]
    log_ratios: np.ndarray
    """[T], nats."""


def read_token_answers(path: Path) -> tuple[TokenAnswer, ...]:
    """Read what megatron-sppo inspect wrote -> answers, best and worst of each prompt; none without the file.

    Raises:
        DataError: a line is not of that form.
    """
    if not path.is_file():
        return ()
    ends: dict[int, list[TokenAnswer]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                answer = _answer(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path}, line {number} is no answer with its tokens. "
                    "Delete the file and run the same command again."
                ) from None
            if answer.group in ends or len(ends) < NUM_SHOWN:
                # The first of the best and the last of the worst.
                ranked = sorted([*ends.get(answer.group, ()), answer], key=lambda answer: -answer.win_rate)
                ends[answer.group] = ranked if len(ranked) < 2 else [ranked[0], ranked[-1]]
    return tuple(answer for of_prompt in ends.values() for answer in of_prompt)


def _answer(line: dict[str, Any]) -> TokenAnswer:
    tokens = line["tokens"]
    # A token without a text of its own shares a character with the next; its ratio belongs to what is seen of it.
    texts = tuple(f"<{token['id']}>" if token["text"] is None else str(token["text"]) for token in tokens)
    return TokenAnswer(
        group=int(line["group"]),
        prompt_id=str(line["prompt_id"]),
        win_rate=float(line["win_rate"]),
        log_ratio=float(line["log_ratio"]),
        texts=texts,
        log_ratios=np.array([token["log_ratio"] for token in tokens], dtype=np.float64),
    )


def token_html(answers: Sequence[TokenAnswer], prompts: dict[str, str], escape: Callable[[str], str]) -> str:
    """Lay answers out in pairs, each token on its colour -> HTML; empty without answers.

    Args:
        prompts: prompt_id -> the prompt as people read it.
        escape: makes text safe for the page.
    """
    if not answers:
        return ""
    full = full_colour(answers)
    blocks = [_legend(full)]
    groups = dict.fromkeys(answer.group for answer in answers)
    for group in groups:
        of_prompt = [answer for answer in answers if answer.group == group]
        prompt = escape(prompts.get(of_prompt[0].prompt_id, of_prompt[0].prompt_id))
        boxes = "".join(_box(title, answer, full, escape) for title, answer in zip(_TITLES, of_prompt, strict=False))
        blocks.append(f'<div class="prompt">{prompt}</div><div class="pair">{boxes}</div>')
    return "".join(blocks)


_TITLES = ("best answer", "worst answer")


def full_colour(answers: Iterable[TokenAnswer]) -> float:
    """Choose the |log-ratio| that gets the full colour -> nats: the 95th percentile of all tokens, or 1 if it is 0."""
    sizes = np.abs(np.concatenate([answer.log_ratios for answer in answers]))
    return float(np.quantile(sizes, _FULL_COLOUR_QUANTILE)) or 1.0


def colour(log_ratio: float, full: float) -> str:
    """Choose a token's background -> CSS colour: blue above 0, orange below, the paler the nearer to it."""
    red, green, blue = _MORE if log_ratio > 0 else _LESS
    return f"rgba({red},{green},{blue},{_STRONGEST * min(1.0, abs(log_ratio) / full):.2f})"


def _box(title: str, answer: TokenAnswer, full: float, escape: Callable[[str], str]) -> str:
    spans, pending = [], 0.0
    for text, log_ratio in zip(answer.texts, answer.log_ratios.tolist(), strict=True):
        pending += log_ratio
        if not text:
            continue
        spans.append(
            f'<span style="background:{colour(pending, full)}" title="{pending:+.3g} nats">{escape(text)}</span>'
        )
        pending = 0.0
    head = html.escape(f"{title}: win rate {100 * answer.win_rate:.0f} %, log-ratio {answer.log_ratio:+.2f} nats")
    return f'<div class="answer"><h4>{head}</h4><div class="text tokens">{"".join(spans)}</div></div>'


def _legend(full: float) -> str:
    stops = ", ".join(colour(full * step / 4, full) for step in range(-4, 5))
    bar = f'<i style="background:linear-gradient(90deg, {stops})"></i>'
    return f'<div class="scale">less likely, {-full:.2g} nats a token{bar}{full:+.2g} nats, more likely</div>'
