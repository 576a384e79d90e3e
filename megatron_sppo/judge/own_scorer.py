"""A user's own scorer as a check: `python:FILE:FUNCTION`."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_sppo.judge.checks import Check, RefusedChecks, UncheckedAnswer
from megatron_sppo.rollout.records import Turn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def load_scorer(target: str) -> Check:
    """Load a user's own scorer, FILE:FUNCTION -> a check with one number.

    Raises:
        RefusedChecks: a file that cannot be imported, or without that function.
    """
    file, _, function = target.rpartition(":")
    path = Path(file)
    module = _imported(path)
    scorer = getattr(module, function, None)
    if not callable(scorer):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise RefusedChecks(
            f"{path} has no function {function!r}. Use --judge python:{path}:{names[-1] if names else 'FUNCTION'}."
        )

    def check(answer: str, messages: list[Turn], columns: dict[str, Any]) -> list[float]:
        with _told(path, f"{function}()"):
            score = scorer(answer, messages, columns)
        if (number := _number(score)) is None:
            raise UncheckedAnswer(
                f"{function}() of {path.name} returned {_shown(score)}: a score is a number in [0, 1], or True or False"
            )
        return [number]

    return check


def _number(score: object) -> float | None:
    """Take a scorer's result as a number in [0, 1] -> it, None where it is none."""
    with contextlib.suppress(Exception):  # foreign objects: an array of two has no item()
        item = getattr(score, "item", None)  # numpy's and torch's numbers are numbers too
        number = item() if callable(item) else score
        if isinstance(number, (bool, int, float)) and 0 <= number <= 1:  # NaN is not
            return float(number)
    return None


def _shown(score: object) -> str:
    """Spell what a scorer has returned -> text that is the same in every process."""
    try:
        text = _stable(repr(score))
    except Exception:  # noqa: BLE001 (foreign objects)
        text = f"an object of type {type(score).__name__}"
    return text[:60] + ("..." if text[60:] else "")


def _stable(text: str) -> str:
    """Leave out of a text what differs from process to process, and what no file can hold -> text."""
    return _ADDRESS.sub("", text).encode(errors="backslashreplace").decode()


def _imported(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside it may be imported, as in a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RefusedChecks(f"{path} is no Python file. Use --judge python:FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        with _told(path, "the file"):
            spec.loader.exec_module(module)
    except UncheckedAnswer as error:
        raise RefusedChecks(f"{path} cannot be imported: {error}. Mend it, and run the same command again.") from None
    return module


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into an UncheckedAnswer with its place."""
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001 (foreign code: whatever it raises is that answer's fault)
        traceback.print_exc()
        places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (places[-1] if places else None)
        text = _stable(" ".join(str(error).split())[:200])
        place = f" (line {line} of {path.name})" if line else ""
        raise UncheckedAnswer(f"{what} raises {': '.join(filter(None, (type(error).__name__, text)))}{place}") from None
