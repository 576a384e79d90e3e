"""Proves of tests/imports.py: an import of Megatron-Core is found however far away and deep it is."""

from pathlib import Path

import pytest

from tests.imports import REPOSITORY, imports_megatron

FILES = {
    "package/__init__.py": "",
    "package/far.py": "def f():\n    from megatron.core import parallel_state\n",
    "package/near.py": "from package import far\n",
    "package/none.py": "import json\nfrom package import other\nMESSAGE = 'pip install megatron.core >= 0.16'\n",
    "package/other.py": "import package.none\nimport megatron_sppo\n",
    "package/named.py": "import importlib\nimportlib.import_module('megatron.core.optimizer')\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"), [("far", True), ("near", True), ("named", True), ("none", False), ("other", False)]
)
def test_imports_are_followed_through_functions_modules_and_circles(root: Path, name: str, expected: bool) -> None:
    assert imports_megatron(root / "package" / f"{name}.py", root) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unit/model/test_rope.py", True),  # it imports Megatron-Core itself
        ("unit/training/test_batches.py", True),  # the package does
        ("distributed/test_layouts.py", True),  # what its ranks run does, inside a function
        ("distributed/test_harness.py", True),  # by name
        ("unit/objective/test_loss.py", False),
        ("unit/rollout/test_prompts.py", False),
    ],
)
def test_the_repository_s_own_tests_are_told_apart(name: str, expected: bool) -> None:
    assert imports_megatron(REPOSITORY / "tests" / name) == expected
