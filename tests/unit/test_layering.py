"""Proves the import rules of the design on the source itself: every `import` counts, also inside a function.

It reads syntax, so it sees neither importlib calls nor names built at run time.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_sppo"

# The ground: files at the package's root import nothing of it but each other. All else lives in a folder, floor by
# floor, lowest first; a module may import its own folder, the floors below and the ground.
GROUND = (
    "errors",
    "storage",
    "locks",
    "json_files",
    "command_line",
    "hangs",
    "cpu",
    "config",
    "config_fields",
    "config_refusals",
    "config_text",
    "layer_parts",
    "architecture",
    "model_file",
    "weight_counts",
    "flops",
)
FLOORS = (
    GROUND,
    ("objective", "checkpoints", "cluster", "tracking"),
    ("rollout", "data", "model", "conversion"),
    ("judge", "training"),
    ("verification", "planning", "selfplay"),
    ("evaluation",),
    ("report",),
    # megatron_sppo/examples is a link to examples/, and `megatron-sppo train` runs the story that stands there.
    ("examples",),
    ("commands",),
    # The door: the one file at the root that is not ground.
    ("__main__",),
    ("tools", "benchmarks"),
)

BANS = {
    # The pool knows nothing of models, answers or judges.
    "cluster": {"megatron", "vllm", "transformers", "torch"},
    "rollout": {"megatron"},
    "judge": {"megatron", "megatron_sppo.model", "megatron_sppo.conversion"},
    "training": {"vllm", "transformers"},
    "model": {"vllm", "transformers"},
    "data": {"megatron", "vllm", "transformers"},
    "conversion": {"megatron_sppo.training", "megatron_sppo.model"},
    "planning": {"vllm", "transformers"},
    "objective": {"megatron", "vllm", "transformers", "megatron_sppo.training", "megatron_sppo.model"},
}
SEALED = {"megatron_sppo.checkpoints.transfer": "checkpoints"}
"""Modules that their own folder alone may import: the byte mover stands behind a reader and a writer of each world."""
GROUND_MAY_NOT = {"torch", "megatron", "vllm", "transformers", "transformer_engine"}


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


def floor_of(room: str) -> int:
    """Find the floor of a folder, or of a file of the ground -> its number, 0 the lowest."""
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{room} is on no floor: add it to FLOORS, if it must exist"
    return found[0]


def violations(module: str, source: str) -> list[str]:
    """Apply every rule to one module -> what it breaks, in words."""
    if not module:
        return []
    room = module.split(".")[0]
    floor = floor_of(room)
    broken = []
    for imported in imports(source, module):
        for banned in GROUND_MAY_NOT if floor == 0 else BANS.get(room, set()):
            if imported == banned or imported.startswith(banned + "."):
                broken.append(f"{module} imports {imported}: banned there")
        for sealed, home in SEALED.items():
            if (imported == sealed or imported.startswith(sealed + ".")) and room != home:
                broken.append(f"{module} imports {imported}: sealed in {home}")
        if not imported.startswith("megatron_sppo.") or imported == "megatron_sppo.__version__":
            continue
        other = imported.split(".")[1]
        if (other != room and floor_of(other) >= floor > 0) or (floor == 0 and other not in GROUND):
            broken.append(f"{module} (floor {floor}) imports {imported} (floor {floor_of(other)})")
    return broken


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Find modules that import each other, however far round -> each circle's modules, sorted."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reach = {module: reached(module) for module in graph}
    return sorted({tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in graph if a in reach[a]})


def test_no_modules_import_each_other_in_a_circle():
    sources = {dotted(path): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = {name.removeprefix("megatron_sppo.") for name in imports(source, module)}
        graph[module] = {name if name in sources else name.rpartition(".")[0] for name in names} & set(sources)
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]


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
        ("errors", "from megatron_sppo.checkpoints import tokenizer"),
        ("data.writer", "from megatron_sppo.rollout.records import RolloutGroup"),
        ("rollout.samplers", "def f():\n    import megatron.core.datasets"),
        ("rollout.samplers", "from megatron_sppo.data.writer import DatasetWriter"),
        ("cluster.pool", "from megatron_sppo.rollout.sampler import Shard"),
        ("judge.pairrm", "from megatron_sppo.model import policy"),
        ("data.writer", "def f():\n    from transformers import AutoTokenizer"),
        ("data.indexed", "from megatron.core.datasets.indexed_dataset import IndexedDataset"),
        ("model.policy", "from vllm import LLM"),
        ("training.loop", "import transformers"),
        ("training.loop", "from megatron_sppo.selfplay import loop"),
        ("conversion.convert", "from megatron_sppo.training import checkpoint"),
        ("conversion.convert", "from megatron_sppo import training"),
        ("conversion.convert", "from megatron_sppo.model.policy import build"),
        ("selfplay.loop", "from megatron_sppo import verification"),
        ("conversion.convert", "from megatron_sppo.checkpoints.transfer import Transfer"),
        ("benchmarks.convert", "from megatron_sppo.checkpoints import transfer"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rollout.samplers", "from vllm import LLM\nfrom megatron_sppo.rollout.records import RolloutGroup"),
        ("judge.rules", "from megatron_sppo.rollout.records import RolloutGroup\nfrom megatron_sppo import errors"),
        ("data.writer", "from megatron_sppo.data.schema import Manifest\nimport torch"),
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
