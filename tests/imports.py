"""Which test modules stand on Megatron-Core, read from their source: every `import` counts, also inside a function.

Those run again on the second version of Megatron-Core; a test that cannot see it need not.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


_BY_NAME = re.compile(r"""(["'])(megatron(?:\.\w+)+)\1""")
"""As importlib.import_module takes it."""


@cache
def imported(path: Path) -> frozenset[str]:
    """Names that a file imports, in full: `from a import b` counts as a.b, and so does the text "megatron.core"."""
    text = path.read_text(encoding="utf-8")
    by_name = (name for _, name in _BY_NAME.findall(text))
    return frozenset((*_imports(ast.parse(text).body), *by_name))


def _imports(statements: Iterable[ast.AST]) -> Iterator[str]:
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:  # expressions, in which nothing is imported, are passed over
            for blocks in ("body", "handlers", "orelse", "finalbody", "cases"):
                inner = getattr(node, blocks, ())
                yield from _imports(inner if isinstance(inner, list) else ())


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


def with_imports(paths: Iterable[Path], root: Path = REPOSITORY) -> set[Path]:
    """Follow the imports of files within the repository -> the files and all that they stand on."""
    waiting = list(paths)
    found = set(waiting)
    while waiting:
        sources = {source_of(name, root) for name in imported(waiting.pop())}
        new = {path for path in sources if path is not None} - found
        found |= new
        waiting += new
    return found


@cache
def imports_megatron(path: Path, root: Path = REPOSITORY) -> bool:
    """Whether a file, or one that it stands on, imports Megatron-Core."""
    names = (name for file in with_imports([path], root) for name in imported(file))
    return any(name.split(".")[0] == "megatron" for name in names)
