"""Proves: of a root's checkpoints the newest whole ones stay, and what something refers to; a kill leaves no half one.

That training calls it after each save, and resumes from what stays, is in tests/distributed/test_pretrain.py.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.checkpoints import retention
from megatron_sppo.checkpoints.megatron_checkpoint import (
    TRACKER_FILE,
    iterations,
    resolve_checkpoint,
    verify_checkpoint,
)
from megatron_sppo.checkpoints.retention import keep_last
from tests.unit.checkpoints.test_megatron_checkpoint import finished


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Iterations 1 to 5, the tracker at 5."""
    for iteration in range(1, 6):
        finished(tmp_path, iteration)
    return tmp_path


@pytest.mark.parametrize(("count", "stay"), [(1, [5]), (2, [4, 5]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_stay(root: Path, count: int, stay: list[int]) -> None:
    removed = keep_last(root, count, newest=5)
    assert iterations(root) == stay
    assert sorted(int(path.name[5:]) for path in removed) == [n for n in range(1, 6) if n not in stay]
    assert not list(root.glob(".iter*"))
    assert resolve_checkpoint(root).name == "iter_0000005"


@pytest.mark.parametrize("damage", ["cut", "missing", "no manifest"])
def test_what_is_not_whole_does_not_count(root: Path, damage: str) -> None:
    for number in (3, 5):
        path = root / f"iter_{number:07d}"
        if damage == "cut":
            os.truncate(path / "__0_0.distcp", 3)
        else:
            (path / {"missing": "__0_0.distcp", "no manifest": "manifest.json"}[damage]).unlink()
    keep_last(root, 2, newest=5)
    assert iterations(root) == [2, 3, 4, 5], "4 and 2 are the newest two that are whole"


def test_where_too_few_are_whole_nothing_goes(root: Path) -> None:
    for number in (2, 3, 4, 5):
        (root / f"iter_{number:07d}/manifest.json").unlink()
    assert keep_last(root, 2, newest=5) == []
    assert iterations(root) == [1, 2, 3, 4, 5]


def test_the_tracked_one_and_those_that_are_needed_stay(root: Path) -> None:
    (root / TRACKER_FILE).write_text("2\n")
    keep_last(root, 1, newest=5, needed=[root / "iter_0000003", root / "iter_0000001/hf/config.json", root.parent])
    assert iterations(root) == [1, 2, 3, 5]


def test_a_run_that_was_taken_back_does_not_touch_what_lies_ahead(root: Path) -> None:
    (root / TRACKER_FILE).write_text("3\n")
    keep_last(root, 2, newest=3)
    assert iterations(root) == [2, 3, 4, 5]


@pytest.mark.parametrize("failing", range(1, 8))
def test_a_kill_in_mid_removal_leaves_whole_checkpoints_alone_and_the_next_call_cleans_up(
    root: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at its n-th removal of a file."""
    unlink, calls = os.unlink, iter(range(1, 100))

    class KilledHere(BaseException):
        pass

    def dying(*arguments: Any, **settings: Any) -> None:
        if next(calls) == failing:
            raise KilledHere
        unlink(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dying)
        with pytest.raises(KilledHere):
            keep_last(root, 2, newest=5)
    for number in iterations(root):
        verify_checkpoint(root / f"iter_{number:07d}")
    assert {4, 5} <= set(iterations(root))
    assert len(list(root.glob(".iter_*.removed-*"))) == 1
    keep_last(root, 2, newest=5)
    assert iterations(root) == [4, 5] and not list(root.glob(".iter*"))


def test_it_is_renamed_before_a_file_of_it_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    remove = shutil.rmtree

    def watching(path: Path, **settings: Any) -> None:
        seen.append(iterations(root))
        remove(path, **settings)

    monkeypatch.setattr(retention.shutil, "rmtree", watching)
    keep_last(root, 4, newest=5)
    assert seen == [[2, 3, 4, 5]]
