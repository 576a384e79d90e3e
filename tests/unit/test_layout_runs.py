"""Proves of tests/layout_runs.py: which change makes which layouts due, and that a run is noted with what it ran on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import layout_runs
from tests.imports import REPOSITORY, with_imports

FILES = {
    "setup.py": 'requires = ["megatron-core>=0.16.1,<0.20", "numpy"]\n',
    "megatron_sppo/training/loop.py": "from megatron_sppo.checkpoints import reader\n",
    "megatron_sppo/training/alone.py": "",
    "megatron_sppo/checkpoints/reader.py": "",
    "megatron_sppo/judge/rules.py": "",
    "tests/distributed/test_layouts.py": "def test():\n    from megatron_sppo.training import loop\n",
    "tests/conftest.py": "from tests import models\n",
    "tests/models.py": "",
    "examples/pretrain_sppo.py": "",
    "tools/inspect_log_ratio.py": "",
    "examples/configs/llama3_70b_h100.yaml": "",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "due"),
    [
        ("megatron_sppo/training/loop.py", {"every", "cover"}),
        ("megatron_sppo/training/alone.py", {"every"}),  # no test of several ranks imports it
        ("megatron_sppo/checkpoints/reader.py", {"cover"}),
        ("tests/distributed/test_layouts.py", {"cover"}),
        ("tests/models.py", {"cover"}),
        ("examples/pretrain_sppo.py", {"cover"}),
        ("examples/configs/llama3_70b_h100.yaml", {"cover"}),
        ("megatron_sppo/judge/rules.py", set()),
    ],
)
def test_a_change_makes_due_what_stands_on_it(root: Path, name: str, due: set[str]) -> None:
    noted = root / "noted.json"
    layout_runs.note("every", layout_runs.sources(root), noted)
    before = layout_runs.sources(root)
    assert all(layout_runs.holds(kind, before, noted) for kind in before)
    (root / name).write_text(FILES[name] + "A = 1\n")
    now = layout_runs.sources(root)
    assert {kind for kind in now if not layout_runs.holds(kind, now, noted)} == due


def test_a_new_file_another_name_and_another_range_of_megatron_core_are_changes(root: Path) -> None:
    before = layout_runs.sources(root)
    (root / "megatron_sppo/training/alone.py").rename(root / "megatron_sppo/training/renamed.py")
    assert layout_runs.sources(root)["every"] != before["every"]
    (root / "megatron_sppo/training/renamed.py").rename(root / "megatron_sppo/training/alone.py")
    assert layout_runs.sources(root) == before
    (root / "setup.py").write_text(FILES["setup.py"].replace("0.20", "0.21"))
    now = layout_runs.sources(root)
    assert now["every"] != before["every"] and now["cover"] != before["cover"]
    (root / "setup.py").write_text(FILES["setup.py"].replace("numpy", "scipy"))
    assert layout_runs.sources(root) == before


def test_a_run_of_the_cover_is_no_run_of_every_layout_and_nothing_noted_is_due(tmp_path: Path) -> None:
    noted, old, new = tmp_path / "noted.json", {"every": "a", "cover": "b"}, {"every": "c", "cover": "d"}
    assert not layout_runs.holds("cover", old, noted) and not layout_runs.holds("every", old, noted)
    layout_runs.note("cover", old, noted)
    assert layout_runs.holds("cover", old, noted) and not layout_runs.holds("every", old, noted)
    layout_runs.note("every", old, noted)
    layout_runs.note("cover", new, noted)
    assert json.loads(noted.read_text()) == {"every": "a", "cover": "d"}


def test_exit_code_0_alone_says_that_a_run_holds_and_nothing_unreadable_does(root: Path) -> None:
    """make takes any failure for a change."""
    for name in ("layout_runs.py", "imports.py"):
        shutil.copy(REPOSITORY / "tests" / name, root / "tests" / name)

    def answer(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tests.layout_runs", *words]
        return subprocess.run(command, cwd=root, env={}, capture_output=True, text=True)

    assert answer("passed", "every", *answer("sources").stdout.split()).returncode == 0
    assert answer("holds", "every").returncode == answer("holds", "cover").returncode == 0
    noted = root / "tests/layout_runs.json"
    whole = noted.read_text()
    for damaged in ("", "{}", whole[:-3]):
        noted.write_text(damaged)
        assert answer("holds", "cover").returncode != 0
    noted.write_text(whole)
    (root / "setup.py").unlink()
    assert answer("holds", "cover").returncode != 0


def test_the_repository_s_own_layouts_stand_on_the_rooms_below_training_and_on_no_judge() -> None:
    files = with_imports(REPOSITORY.glob("tests/distributed/*.py"))
    rooms = {path.relative_to(REPOSITORY / "megatron_sppo").parts[0] for path in files if "megatron_sppo" in path.parts}
    assert {"training", "model", "data", "planning", "checkpoints", "conversion", "objective"} <= rooms
    assert not {"judge", "report", "selfplay", "cluster"} & rooms
