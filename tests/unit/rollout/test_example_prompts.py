"""Proves what the README says of examples/data/prompts.jsonl; that the prompts are good only reading can tell."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

from megatron_sppo.rollout.prompts import read_prompts

FILE = Path(__file__).resolve().parents[3] / "examples/data/prompts.jsonl"


def test_all_rows_are_usable_and_split_in_training_and_held_out() -> None:
    found = read_prompts(FILE)
    assert found.quarantined == ()
    splits = Counter(json.loads(line)["split"] for line in FILE.read_text().splitlines())
    assert set(splits) == {"train", "heldout"}
    assert splits["train"] >= 224
    assert splits["heldout"] >= 96


def test_the_file_is_ascii_and_its_prompts_are_short() -> None:
    assert FILE.read_bytes().isascii()
    assert all(15 <= len(prompt.messages[0]["content"]) <= 160 for prompt in read_prompts(FILE).prompts)


def test_no_two_prompts_are_near_duplicates() -> None:
    """Fewer than two thirds of all words shared."""
    words = [
        set(re.findall(r"[a-z0-9]+", prompt.messages[0]["content"].lower())) for prompt in read_prompts(FILE).prompts
    ]
    near = [(a, b) for a, b in combinations(words, 2) if len(a & b) >= 2 / 3 * len(a | b)]
    assert near == []
