"""Which test modules stand on Megatron-Core, read from their source: every `import` counts, also inside a function.

Those run again on the second version of Megatron-Core; a test that cannot see it need not.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


@cache
def imported(path: Path) -> frozenset[str]:
    """Names that a file imports, in full: `from a import b` counts as a.b, and so does the text "megatron.core"."""
    return frozenset(_imports(ast.parse(path.read_text(encoding="utf-8"))))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"megatron(\.\w+)+", str(node.value)):
            yield str(node.value)  # importlib.import_module("megatron.core")


@cache
def source_of(name: str, root: Path = REPOSITORY) -> Path | None:
    """Find the file of a module of this repository, or of the module that a name is in -> None for other packages."""
    while name:
        path = root.joinpath(*name.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
        name = name.rpartition(".")[0]
    return None


@cache
def imports_megatron(path: Path, root: Path = REPOSITORY) -> bool:
    """Follow a file's imports within the repository -> whether one of them is Megatron-Core's."""
    seen, waiting = {path}, [path]
    while waiting:
        for name in imported(waiting.pop()):
            if name.split(".")[0] == "megatron":
                return True
            source = source_of(name, root)
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)
    return False
