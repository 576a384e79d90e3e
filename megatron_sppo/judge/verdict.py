"""How a language model's reply is read as a verdict on "A beats B"."""

from __future__ import annotations

import math
from typing import Any

VERDICTS_VERSION = 2
"""Raised when replies are read otherwise: stored scores of another version are not resumed."""
VERDICT_LOGIT = 2.0
"""Nats of a bare verdict: a server that gives no log-probabilities says nothing about how sure its model was."""
LARGEST_LOGIT = 10.0
"""Nats; log-probabilities of a sure model run to infinity."""
LEAST_MASS = 0.1
"""Less probability on both letters together is no verdict: the model was about to say something else."""
THINKING_ENDS = "</think>"
UNREADABLE = "unreadable_verdicts"
"""How a verdict was read that is none."""


def verdict_logit(choice: dict[str, Any]) -> tuple[float, str]:
    """Read a verdict -> (logit of "A beats B" in nats, how it was read).

    log p(A) - log p(B) over the alternatives of the verdict's token, the first one or the first letter behind the
    reasoning; a letter that is not among them has what it has at most: as much as the least likely one that is, and no
    more than all of them leave. Where that does not say which letter is likelier, the reply itself does; where
    something else than a letter is nearly certain, it is no verdict. "logprob_verdicts", "bare_verdicts", or
    "unreadable_verdicts", which count as a tie.
    """
    listed = _alternatives(choice)
    mass = {letter: sum(math.exp(value) for token, value in listed if _letter(token) == letter) for letter in "AB"}
    probabilities = [math.exp(value) for _, value in listed]
    most_of_missing = max(min([*probabilities, 1 - sum(probabilities)]), 1e-30)
    if mass["A"] + mass["B"] >= LEAST_MASS and (all(mass.values()) or most_of_missing < max(mass.values())):
        logit = math.log(mass["A"] or most_of_missing) - math.log(mass["B"] or most_of_missing)
        return max(-LARGEST_LOGIT, min(LARGEST_LOGIT, logit)), "logprob_verdicts"
    message = choice.get("message")
    text = str(message.get("content") or "") if isinstance(message, dict) else ""
    # With room for more than a letter, some explain themselves in the lines below it.
    letter = _letter((text.rpartition(THINKING_ENDS)[2].strip().splitlines() or [""])[0])
    if letter:
        return (VERDICT_LOGIT if letter == "A" else -VERDICT_LOGIT), "bare_verdicts"
    return 0.0, UNREADABLE


def _alternatives(choice: dict[str, Any]) -> list[tuple[str, float]]:
    """Find the tokens that could have stood in the verdict's place, with their log-probabilities."""
    try:
        entries = choice["logprobs"]["content"]
        texts = [str(entry.get("token", "")) for entry in entries]
        place, written = 0, ""
        for number, text in enumerate(texts):
            written += text
            if written.rstrip().endswith(THINKING_ENDS):
                place = number + 1
        if place:
            # White space may stand before the letter.
            place = next((number for number in range(place, len(texts)) if texts[number].strip()), place)
        listed = [(str(entry["token"]), float(entry["logprob"])) for entry in entries[place]["top_logprobs"]]
        # A probability is at most 1; JSON of some servers holds NaN.
        return [(text, min(value, 0.0)) for text, value in listed if not math.isnan(value)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        return []


def _letter(text: str) -> str:
    stripped = text.strip(" \t\n\r\"'*[]().:\u2581\u0120").upper()
    return stripped if stripped in ("A", "B") else ""
