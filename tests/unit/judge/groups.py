"""Rollout groups for the judge's tests: written by hand or at random, always through the rollouts' own records."""

import random
from collections.abc import Sequence

from megatron_sppo.rollout.records import Response, RolloutGroup

WORDS = [
    "the",
    "water",
    "time",
    "find",
    "long",
    "little",
    "very",
    "after",
    "called",
    "just",
    "where",
    "most",
    "know",
    "get",
    "through",
    "back",
    "much",
    "good",
    "new",
    "write",
    "Think,",
    "look.",
    "also",
    "around",
    "another;",
    "came",
    "come",
    "work",
    "three",
    "word",
    "must",
    "because",
    "(this)",
    "42",
    "it's",
    "naive-ish",
    "end!",
    "why?",
]


def group_of(
    prompt: str | Sequence[dict[str, str]],
    texts: Sequence[str],
    *,
    prompt_id: str = "p0",
    prompt_text: str | None = None,
    finish_reason: str = "stop",
) -> RolloutGroup:
    """Wrap texts as one prompt's responses -> RolloutGroup."""
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
    return RolloutGroup(
        prompt_id=prompt_id,
        messages=messages,
        prompt_token_ids=(1, 2, 3),
        responses=tuple(
            Response(text=text, token_ids=(5, 6 + number, 7), finish_reason=finish_reason, seed=None)
            for number, text in enumerate(texts)
        ),
        prompt_text=prompt_text,
    )


def random_text(rng: random.Random, low: int, high: int) -> str:
    """Draw words -> a text of `low` to `high` of them."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def random_group(rng: random.Random, number: int, num_responses: int, *, high: int = 30) -> RolloutGroup:
    """Draw a prompt and its responses -> RolloutGroup."""
    texts = [random_text(rng, 1, high) for _ in range(num_responses)]
    prompt = random_text(rng, 3, 12)
    return group_of(
        prompt, texts, prompt_id=f"prompt-{number:04d}", prompt_text=f"<|im_start|>user\n{prompt}<|im_end|>\n"
    )
