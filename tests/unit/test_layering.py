"""Proves the import rules of the design on the source itself: every `import` counts, also inside a function.

It reads syntax, so it sees neither importlib calls nor names built at run time.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_sppo"

# Layer by layer, lowest first. A module may import its own layer's own folder and everything below.
LAYERS = (
    ("errors", "storage", "tokenizer", "architecture", "config", "command_line", "pretrained"),
    ("objective", "rollout.records", "rollout.retry_after", "data.schema", "conversion.rules", "zigzag", "flops"),
    ("rollout", "judge", "data", "model", "conversion"),
    ("training",),
    ("layerwise", "probes"),
    ("verification", "selfplay", "planning"),
    ("tools", "examples", "benchmarks"),
)
# Neighbours on one layer that the design joins on purpose.
NEIGHBOURS: set[tuple[str, str]] = set()

BANS = {
    "rollout": {"megatron"},
    "judge": {"megatron"},
    "training": {"vllm", "transformers"},
    "model": {"vllm", "transformers"},
    "data": {"vllm", "transformers"},
    "conversion": {"megatron_sppo.training", "megatron_sppo.model"},
    "planning": {"vllm", "transformers"},
    "objective": {"megatron", "vllm", "transformers", "megatron_sppo.training", "megatron_sppo.model"},
}
BASE_MAY_NOT = {"torch", "megatron", "vllm", "transformers", "transformer_engine"}


def source_files() -> list[Path]:
    folders = (PACKAGE, REPOSITORY / "tools", REPOSITORY / "examples", REPOSITORY / "benchmarks")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def dotted(path: Path) -> str:
    """megatron_sppo/data/writer.py -> data.writer; tools/convert.py -> tools.convert."""
    relative = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else REPOSITORY).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def imports(source: str, module: str) -> Iterator[str]:
    """Names that a module imports, in full: `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide their layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> tuple[int, str]:
    """Find the layer whose entry is the longest prefix -> (layer number, entry)."""
    found = [
        (len(entry), number, entry)
        for number, layer in enumerate(LAYERS)
        for entry in layer
        if module == entry or module.startswith(entry + ".")
    ]
    assert found, f"{module} belongs to no layer: add it to LAYERS, if it must exist"
    _, number, entry = max(found)
    return number, entry


def violations(module: str, source: str) -> list[str]:
    """Apply every rule to one module -> what it breaks, in words."""
    if not module:
        return []
    number, entry = layer_of(module)
    broken = []
    for imported in imports(source, module):
        for banned in BASE_MAY_NOT if number == 0 else BANS.get(module.split(".")[0], set()):
            if imported == banned or imported.startswith(banned + "."):
                broken.append(f"{module} imports {imported}: banned there")
        if not imported.startswith("megatron_sppo."):
            continue
        other_number, other = (
            layer_of(imported.removeprefix("megatron_sppo.")) if imported != "megatron_sppo.__version__" else (0, "")
        )
        same_folder = other.split(".")[0] == entry.split(".")[0]
        if number == 0 or same_folder:
            allowed = other_number <= number or (same_folder and number > 0 and entry.count(".") == 0)
        else:
            allowed = other_number < number or (entry, other) in NEIGHBOURS
        if not allowed:
            broken.append(f"{module} (layer {number}) imports {imported} (layer {other_number})")
    return broken


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_upwards_only(path):
    assert violations(dotted(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "import torch"),
        ("storage", "from megatron_sppo.objective import loss"),
        ("objective.loss", "from megatron_sppo.rollout.records import RolloutGroup"),
        ("objective.loss", "import megatron.core"),
        ("rollout.records", "from megatron_sppo.rollout.samplers import sample"),
        ("rollout.samplers", "def f():\n    import megatron.core.datasets"),
        ("rollout.samplers", "from megatron_sppo.data.writer import DatasetWriter"),
        ("judge.pairrm", "from megatron_sppo.model import policy"),
        ("data.writer", "def f():\n    from transformers import AutoTokenizer"),
        ("model.policy", "from vllm import LLM"),
        ("training.loop", "import transformers"),
        ("training.loop", "from megatron_sppo.selfplay import loop"),
        ("conversion.convert", "from megatron_sppo.training import checkpoint"),
        ("conversion.convert", "from megatron_sppo import training"),
        ("conversion.convert", "from megatron_sppo.model.policy import build"),
        ("selfplay.loop", "from megatron_sppo import verification"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rollout.samplers", "from vllm import LLM\nfrom megatron_sppo.rollout.records import RolloutGroup"),
        ("judge.rules", "from megatron_sppo.rollout.records import RolloutGroup\nfrom megatron_sppo import errors"),
        ("data.writer", "from megatron_sppo.data.schema import Manifest\nimport megatron.core"),
        ("training.loop", "from megatron_sppo.model.policy import build\nfrom megatron_sppo.training import metrics"),
        ("selfplay.loop", "from megatron_sppo.training.config import TrainingConfig"),
        (
            "tools.convert",
            "from megatron_sppo.conversion.convert import import_checkpoint\nfrom megatron_sppo import verification",
        ),
    ],
)
def test_a_permitted_import_is_let_through(module, source):
    assert violations(module, source) == []


def test_no_file_is_called_utils():
    assert [str(path) for path in source_files() if "utils" in path.stem or "helper" in path.stem] == []
