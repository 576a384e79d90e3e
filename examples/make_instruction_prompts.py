"""Write prompts with instructions that can be checked, in IFEval's columns, for `--judge verifiable:ifeval`.

    python examples/make_instruction_prompts.py --output examples/data/instructions.jsonl

Every prompt asks for a short text on a subject and adds one to three instructions (Zhou et al. 2023, arXiv:2311.07911,
made theirs so). No kind of instruction and no topic of the held-out rows occurs in the rows to train on: what is gained
there was not learned by heart. All checks run without NLTK's data, which cannot be downloaded everywhere.
"""

import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo import command_line, config
from megatron_sppo.config import PositiveInt, Seed
from megatron_sppo.errors import ConfigError
from megatron_sppo.storage import atomic_file

logger = logging.getLogger(__name__)

DESCRIPTION = "Write prompts with instructions that can be checked, and a held-out split of other kinds and topics."

TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "cooking": ("tomato soup", "baking bread", "boiling eggs", "a simple salad", "pancakes", "cooking rice"),
        "gardening": ("planting roses", "watering a cactus", "growing herbs", "pruning a tree", "compost", "weeds"),
        "animals": ("cats", "elephants", "honey bees", "owls", "goldfish", "penguins"),
        "weather": ("thunderstorms", "rainbows", "snow", "morning fog", "the wind", "hot summers"),
        "music": ("learning the piano", "drums", "singing in a choir", "folk songs", "old records", "the violin"),
        "sport": ("swimming", "football", "morning runs", "chess", "table tennis", "skiing"),
        "home": ("cleaning windows", "a tidy desk", "painting a wall", "washing clothes", "candles", "a warm blanket"),
        "machines": ("bicycles", "steam engines", "clocks", "elevators", "vacuum cleaners", "windmills"),
        "space": ("the Moon", "the planet Mars", "comets", "falling stars", "black holes", "astronauts"),
        "language": ("learning French", "old letters", "riddles", "poems", "spelling", "nicknames"),
        "food": ("chocolate", "apples", "green tea", "cheese", "pizza", "honey"),
        "town": ("public parks", "buses", "a corner shop", "bridges", "libraries", "street lamps"),
    },
    "heldout": {
        "travel": ("packing a suitcase", "long train rides", "camping", "airports", "maps", "mountain villages"),
        "health": ("sleeping well", "drinking water", "brushing teeth", "a daily walk", "headaches", "fresh air"),
        "school": ("homework", "a first day at school", "exams", "group work", "field trips", "school lunches"),
        "work": ("a job interview", "long meetings", "saving money", "writing emails", "coffee breaks", "teamwork"),
        "sea": ("sharks", "lighthouses", "sailing boats", "tides", "sandy beaches", "whales"),
        "history": ("castles", "the pyramids", "the first printed books", "knights", "old coins", "Vikings"),
    },
}
"""Subjects by split and topic."""

REQUESTS = (
    "Write a short text about {subject}.",
    "Tell me something about {subject}.",
    "Give me one piece of advice or one fact about {subject}.",
    "Explain to a child what is special about {subject}.",
    "Describe {subject}.",
    "Why do some people care about {subject}?",
)

Drawn = tuple[str, dict[str, Any]]
"""A sentence that asks for something, and the arguments of its check."""


def _words_below(rng: random.Random, _: str) -> Drawn:
    number = rng.choice((20, 25, 30, 35, 40))
    sentences = ("Answer with less than {} words.", "Use less than {} words.", "Keep it under {} words.")
    return rng.choice(sentences).format(number), {"num_words": number, "relation": "less than"}


def _no_comma(rng: random.Random, _: str) -> Drawn:
    sentences = ("Do not use any commas.", "Your answer must not contain commas.", "Refrain from the use of commas.")
    return rng.choice(sentences), {}


def _lowercase(rng: random.Random, _: str) -> Drawn:
    sentences = ("Use only lowercase letters.", "Write everything in lowercase letters.", "No capital letters, please.")
    return rng.choice(sentences), {}


def _word_frequency(rng: random.Random, subject: str) -> Drawn:
    keyword, number = subject.split()[-1], rng.choice((2, 3))
    sentences = ('Use the word "{}" at least {} times.', 'The word "{}" should appear at least {} times.')
    arguments = {"keyword": keyword, "frequency": number, "relation": "at least"}
    return rng.choice(sentences).format(keyword, number), arguments


def _end_phrase(rng: random.Random, _: str) -> Drawn:
    phrase = rng.choice(("That is all.", "I hope this helps.", "Ask me for more.", "The end."))
    sentences = ("Finish your answer with the exact phrase: {}", "End with these words and nothing after them: {}")
    return rng.choice(sentences).format(phrase), {"end_phrase": phrase}


def _quotation(rng: random.Random, _: str) -> Drawn:
    sentences = ("Wrap your entire answer in double quotation marks.", "Put double quotation marks around your answer.")
    return rng.choice(sentences), {}


def _bullets(rng: random.Random, _: str) -> Drawn:
    number = rng.choice((2, 3))
    sentences = ("Answer with exactly {} bullet points, each on a line that starts with *.",)
    return rng.choice(sentences).format(number), {"num_bullets": number}


def _title(rng: random.Random, _: str) -> Drawn:
    sentences = (
        "Begin with a title in double angular brackets, such as <<a title>>.",
        "Your answer must contain a title, wrapped in double angular brackets, such as <<title>>.",
    )
    return rng.choice(sentences), {}


def _word_range(rng: random.Random, _: str) -> Drawn:
    low, high = rng.choice(((10, 30), (15, 35), (20, 40)))
    sentences = ("Use between {} and {} words.", "Your answer should have {} to {} words.")
    return rng.choice(sentences).format(low, high), {"min_words": low, "max_words": high}


def _keywords(rng: random.Random, _: str) -> Drawn:
    words = rng.sample(("always", "small", "people", "because", "important", "time", "good", "often"), 2)
    sentences = ('Include the words "{}" and "{}".', 'Your answer must contain the keywords "{}" and "{}".')
    return rng.choice(sentences).format(*words), {"keywords": sorted(words)}


def _forbidden_words(rng: random.Random, _: str) -> Drawn:
    words = rng.sample(("the", "and", "is", "are", "can", "of", "for"), 2)
    sentences = ('Do not use the words "{}" and "{}".', 'Avoid the words "{}" and "{}".')
    return rng.choice(sentences).format(*words), {"forbidden_words": sorted(words)}


def _rare_letter(rng: random.Random, _: str) -> Drawn:
    letter, number = rng.choice((("m", 4), ("d", 5), ("c", 5), ("u", 5), ("p", 4)))
    arguments = {"letter": letter, "let_frequency": number, "let_relation": "less than"}
    return f"The letter {letter} should appear less than {number} times.", arguments


def _capitals(rng: random.Random, _: str) -> Drawn:
    sentences = ("Use only capital letters.", "Your entire answer should be in capital letters.")
    return rng.choice(sentences), {}


def _postscript(rng: random.Random, _: str) -> Drawn:
    sentences = ("Add a postscript at the end that starts with P.S.", "Close with a postscript starting with P.S.")
    return rng.choice(sentences), {"postscript_marker": "P.S."}


def _highlights(rng: random.Random, _: str) -> Drawn:
    sentences = ("Highlight at least one part with markdown, i.e. *highlighted part*.",)
    return rng.choice(sentences), {"num_highlights": 1}


KINDS: dict[str, dict[str, Callable[[random.Random, str], Drawn]]] = {
    "train": {
        "length_constraints:number_words": _words_below,
        "punctuation:no_comma": _no_comma,
        "change_case:english_lowercase": _lowercase,
        "keywords:frequency": _word_frequency,
        "startend:end_checker": _end_phrase,
        "startend:quotation": _quotation,
        "detectable_format:number_bullet_lists": _bullets,
        "detectable_format:title": _title,
    },
    "heldout": {
        "count:word_count_range": _word_range,  # IFBench's, as all others are IFEval's
        "keywords:existence": _keywords,
        "keywords:forbidden_words": _forbidden_words,
        "keywords:letter_frequency": _rare_letter,
        "change_case:english_capital": _capitals,
        "detectable_content:postscript": _postscript,
        "detectable_format:number_highlighted_sections": _highlights,
    },
}
"""What draws an instruction, by split and id."""

NUM_INSTRUCTIONS = (1, 2, 2, 3)
"""Drawn from for every prompt."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Write prompts whose answers can be checked."""

    output: Path
    """JSON Lines file to write."""
    num_train: PositiveInt = 384
    """Prompts to train on."""
    num_heldout: PositiveInt = 144
    """Prompts for the evaluation, of other kinds and topics."""
    seed: Seed = 0
    """The same seed and numbers give the same file."""


def make_rows(split: str, num_prompts: int, *, seed: int) -> list[dict[str, Any]]:
    """Make the prompts of a split -> rows in IFEval's columns, every kind and subject about equally often.

    Raises:
        ConfigError: more prompts than differ from each other.
    """
    rng = random.Random(f"{split} {seed}")
    subjects = [(topic, subject) for topic, names in TOPICS[split].items() for subject in names]
    if num_prompts > (most := len(subjects) * len(REQUESTS)):
        raise ConfigError(f"--num-{split} is {num_prompts}, but there are {most} requests. Use --num-{split} {most}.")
    asked = [(topic, subject, request) for topic, subject in subjects for request in REQUESTS]
    rng.shuffle(asked)
    kinds = _Rounds(tuple(KINDS[split]), rng)
    rows = []
    for number, (topic, subject, request) in enumerate(asked[:num_prompts], start=1):
        names = kinds.take(rng.choice(NUM_INSTRUCTIONS))
        drawn = [KINDS[split][name](rng, subject) for name in names]
        rows.append(
            {
                "prompt_id": f"{split}-{number:03d}",
                "prompt": " ".join([request.format(subject=subject), *(sentence for sentence, _ in drawn)]),
                "split": split,
                "topic": topic,
                "instruction_id_list": names,
                "kwargs": [arguments for _, arguments in drawn],
            }
        )
    return rows


class _Rounds:
    """Names in rounds, each shuffled anew: every one of them is taken about equally often."""

    def __init__(self, names: Sequence[str], rng: random.Random) -> None:
        self._names, self._rng, self._left = names, rng, list[str]()

    def take(self, count: int) -> list[str]:
        """Take the next names, none twice -> `count` names."""
        taken: list[str] = []
        while len(taken) < count:
            if not (fresh := [name for name in self._left if name not in taken]):
                self._left += self._rng.sample(self._names, len(self._names))
                continue
            taken.append(fresh[0])
            self._left.remove(fresh[0])
        return taken


def main() -> None:
    """Write the file."""
    settings = config.parse(PromptsConfig, name="make_instruction_prompts.py", description=DESCRIPTION)
    rows = make_rows("train", settings.num_train, seed=settings.seed)
    rows += make_rows("heldout", settings.num_heldout, seed=settings.seed)
    with atomic_file(settings.output) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    logger.info("wrote %s (%d prompts)", settings.output, len(rows))


if __name__ == "__main__":
    command_line.run(main, name="make_instruction_prompts.py")
