"""IFEval's and IFBench's own checks, by the library `if-verifiable`, and what it does not say: why a row has none.

IFEval: Zhou et al. 2023, arXiv:2311.07911. IFBench: Pyatkin et al. 2025, arXiv:2507.02833. if-verifiable 0.1.2 skips
instructions that it does not know, draws arguments that a row does not give at random, and downloads what NLTK lacks;
langdetect 1.0.9 draws at random too. Here such rows are not checked, and chance is seeded.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import random
import re
from typing import Any

import nltk
from langdetect import DetectorFactory

from megatron_sppo.judge.checks import UncheckedAnswer
from megatron_sppo.judge.source import last_user_message
from megatron_sppo.rollout.records import Turn

nltk.download = lambda *_, **__: False  # if_verifiable.ifbench asks for it when it is imported
from if_verifiable.common import evaluate_instructions, strip_thinking  # noqa: E402
from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as IFBENCH  # noqa: E402
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as IFEVAL  # noqa: E402

DetectorFactory.seed = 0
INSTRUCTIONS: dict[str, Any] = {**IFBENCH, **IFEVAL}
"""Both benchmarks' checks by id; no id is in both."""
_RESOURCES = {
    "punkt": "tokenizers/punkt",
    "punkt_tab": "tokenizers/punkt_tab",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "stopwords": "corpora/stopwords",
}
_LISTS = ("keywords", "forbidden_words")
_LACKING = re.compile(r"download\(['\"](\w+)['\"]\)")


def versions() -> dict[str, str]:
    """Gather what decides a verdict -> {package or NLTK resource: version, or whether it is there}."""
    packages = ("if-verifiable", "langdetect", "nltk", "emoji", "syllapy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return found | {f"nltk:{name}": str(_is_there(path)) for name, path in _RESOURCES.items()}


def _is_there(resource: str) -> bool:
    try:
        nltk.data.find(resource)
    except LookupError:
        return False
    return True


def check_instructions(answer: str, messages: list[Turn], columns: dict[str, Any]) -> list[float]:
    """Check one answer against every instruction of its prompt, strictly -> 1 or 0 an instruction.

    An empty answer follows none. As in the library, what stands before `</think>` is not read.

    Raises:
        UncheckedAnswer: the row's columns are not IFEval's, or a check cannot be run.
    """
    names, arguments = read_columns(columns)
    prompt = last_user_message(messages)
    for name, given in zip(names, arguments, strict=True):
        refuse_chance(name, given)
    if not strip_thinking(answer).strip():
        return [0.0] * len(names)
    passed = []
    for name, given in zip(names, arguments, strict=True):
        with _Faults(name):
            (result,), _ = evaluate_instructions(answer, [name], [given], prompt, INSTRUCTIONS)
        passed.append(float(result.strict_pass))
    return passed


def read_columns(columns: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Read IFEval's columns -> (ids of the instructions, arguments of each, nulls left out).

    Some published sets spell `kwargs` as JSON.

    Raises:
        UncheckedAnswer: says which column is missing or wrong.
    """
    names, arguments = columns.get("instruction_id_list"), columns.get("kwargs")
    if names is None:
        raise UncheckedAnswer("its prompt has no instruction_id_list, which verifiable:ifeval checks answers by")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise UncheckedAnswer("kwargs is a text that is no JSON") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UncheckedAnswer("instruction_id_list is no list of ids")
    if unknown := [name for name in names if name not in INSTRUCTIONS]:
        raise UncheckedAnswer(f"neither IFEval nor IFBench has the instruction {unknown[0]!r}")
    arguments = [{}] * len(names) if arguments is None else arguments
    if not isinstance(arguments, list) or len(arguments) != len(names):
        found = len(arguments) if isinstance(arguments, list) else type(arguments).__name__
        raise UncheckedAnswer(f"kwargs is no list of {len(names)} mappings, one an instruction (it is {found})")
    rows = [{} if given is None else given for given in arguments]
    if not all(isinstance(given, dict) for given in rows):
        raise UncheckedAnswer("kwargs holds something that is no mapping")
    return names, [{key: value for key, value in given.items() if value is not None} for given in rows]


def refuse_chance(name: str, given: dict[str, Any]) -> None:
    """Refuse arguments that leave the check to chance, for the library draws what is missing or impossible, or to none.

    Raises:
        UncheckedAnswer: names the instruction and its arguments.
    """
    if wrong := [key for key, value in given.items() if not _is_argument(key, value)]:
        raise UncheckedAnswer(f"{name} cannot be checked with {wrong[0]} {given[wrong[0]]!r} in kwargs")
    checker = INSTRUCTIONS[name](name)
    before = random.getstate()
    with _Faults(name):
        checker.build_description(**given)
    if random.getstate() != before:
        wanted = ", ".join(checker.get_instruction_args_keys())
        raise UncheckedAnswer(
            f"{name} needs {wanted}, of which kwargs gives {given or 'none'}: what is missing or impossible "
            "would be drawn at random"
        )


def _is_argument(key: str, value: Any) -> bool:
    """Look whether a value can be an argument: a text in place of a list is one of letters, "" is in every answer."""
    if key in _LISTS:
        return isinstance(value, list) and all(isinstance(word, str) and word for word in value)
    if isinstance(value, str):
        return value != ""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class _Faults:
    """Turns what a check raises into an UncheckedAnswer that names the instruction."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, LookupError) and (lacking := _LACKING.search(str(error))):
            raise UncheckedAnswer(
                f"{self._name} needs NLTK's {lacking[1]}, which is not installed: "
                f"python -m nltk.downloader {lacking[1]}"
            ) from None
        if isinstance(error, Exception):  # whatever a check raises, it has not been made
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UncheckedAnswer(f"{self._name} cannot be checked ({type(error).__name__}: {reason})") from None
