"""Proves: whatever lies in a stranger's file, only documented errors of one line come out of its reader.

Hypothesis mutates sound files in two ways: as JSON, value by value, and as bytes. Under --soak each reader is also run
by atheris, which follows coverage, where it is installed (`pip install atheris`). That a reader refuses all that it
should is not shown here; tables of faults are (the mark `counts("bad inputs")`).
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reliability.readers import READERS, json_readers
from tests.reliability.tally import Tally

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("inf")),
    *(float("nan"), "", "0", "\x00", "\ud800", "\u2028", "a/b", "../x", "/etc/passwd", "x" * 5000, "-1", "1e999"),
    *([], {}, [[]], [None], [[0, 1], [1]], {"": None}, {"a": {"a": []}}, [0] * 300),
)
ATHERIS_SECONDS = 8


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, seed: Any) -> bytes:
    """Change one to three values of a JSON text: into junk, into a copy of another value, or away."""
    whole = copy.deepcopy(seed)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(whole)))
        other: Any = whole
        if draw(st.booleans()):
            new = copy.deepcopy(draw(st.sampled_from(JUNK)))
        else:
            for key in draw(st.sampled_from(places(whole))):
                other = other[key]
            new = copy.deepcopy(other)
        if not path:
            whole = new
            continue
        parent = whole
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(("set", "set", "set", "drop", "add")))
        if action == "drop":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("", "x", "schema_version", "__class__")))] = new
        else:
            parent[path[-1]] = new
    return json.dumps(whole).encode()


@st.composite
def torn(draw: st.DrawFn, seed: bytes) -> bytes:
    """Change some bytes, cut, repeat or prolong a file."""
    content = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(("flip", "set", "cut", "repeat", "insert")))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[place] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B)))
        elif kind == "cut":
            del content[place:]
        elif kind == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 40))]
        else:
            content[place:place] = draw(st.binary(min_size=1, max_size=12))
    return bytes(content)


FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "half a surrogate pair for a number": ("dataset's manifest", {"num_prompts": "\ud800"}),
    "half a surrogate pair for a choice": ("dataset's manifest", {"preset": "\udfff"}),
    "architectures that are a number": ("config.json", {"architectures": 1}),
    "architectures that are a name": ("config.json", {"architectures": "LlamaForCausalLM"}),
    "a family that is an object": ("config.json", {"model_type": {}}),
    "a family that is a list": ("config.json", {"model_type": ["llama"]}),
    "tied embeddings that are a list": (
        "config.json",
        {"model_type": "qwen3_5", "tie_word_embeddings": [], "text_config": {"tie_word_embeddings": [True]}},
    ),
    "an epsilon beyond float64": ("config.json", {"rms_norm_eps": 10**400}),
    "a score beyond float64": ("preferences", {"score_chosen": 10**400}),
    "an alpha beyond float64": ("adapter.json", {"alpha": 10**400}),
    "an answer whose index is an object": ("server's reply", {"choices": [{"index": {}, "text": ""}]}),
    "a log-probability beyond float64": (
        "judge's answer",
        {"logprobs": {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": 10**400}]}]}},
    ),
}
"""What fuzzing has found, each mended since."""


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("fault", FOUND)
def test_what_was_found_stays_mended(fault: str, tmp_path: Path) -> None:
    name, values = FOUND[fault]
    READERS[name].try_bytes(tmp_path, json.dumps({**READERS[name].content, **values}).encode())


def held(tally: Tally, name: str, strategy: Any, directory: Path, *, examples: int) -> None:
    """Try so many examples; each is a case, and the smallest that fails is shown."""
    reader = READERS[name]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(content=strategy)
    def check(content: bytes) -> None:
        with tally.case("bad inputs", f"{name}: {content[:200]!r}"):
            reader.try_bytes(directory, content)

    check()


@pytest.mark.parametrize("name", json_readers())
def test_any_value_in_its_place_is_read_or_refused_in_one_line(name: str, tally: Tally, tmp_path: Path) -> None:
    examples = len(tally.cases("bad inputs", 25, 400))
    held(tally, name, mutated(READERS[name].content), tmp_path, examples=examples)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused_in_one_line(name: str, tally: Tally, tmp_path: Path) -> None:
    held(tally, name, torn(READERS[name].seed), tmp_path, examples=len(tally.cases("bad inputs", 25, 400)))


def test_random_bytes_are_no_file_of_any_kind(tally: Tally, tmp_path: Path) -> None:
    for name in READERS:
        held(tally, name, st.binary(max_size=60), tmp_path, examples=len(tally.cases("bad inputs", 5, 50)))


@pytest.mark.parametrize("name", READERS)
def test_bytes_that_reach_every_line_are_read_or_refused_in_one_line(
    name: str, pytestconfig: pytest.Config, tally: Tally, tmp_path: Path
) -> None:
    """By coverage, in a process of its own: libFuzzer ends it at the first fault, and keeps the bytes."""
    if not pytestconfig.getoption("--soak") or importlib.util.find_spec("atheris") is None:
        return
    flags = [f"-max_total_time={ATHERIS_SECONDS}", "-rss_limit_mb=4096", "-timeout=20", f"-artifact_prefix={tmp_path}/"]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "seed").write_bytes(READERS[name].seed)
    with tally.case("bad inputs", f"{name}, by coverage"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.reliability.fuzz_by_coverage", name, *flags, str(tmp_path / "corpus")],
            cwd=Path(__file__).parents[2], env={**os.environ, "FUZZ_DIRECTORY": str(tmp_path)}, capture_output=True,
            text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
