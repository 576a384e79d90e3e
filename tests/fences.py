"""Fenced blocks of the Markdown pages, and the commands in them: read by tests/unit/test_docs.py and tests/e2e."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    REPOSITORY / "benchmarks/README.md",
    REPOSITORY / "tests/cudaless/README.md",
    *(
        REPOSITORY / "docs" / name
        for name in re.findall(
            r": ([\w-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
        )
    ),
]
"""In the order of reading: the navigation's."""
MARK = re.compile(r"<!-- (run|config|not run)(?:: (.+?))? -->")


@dataclass(frozen=True, kw_only=True)
class Fence:
    """One block."""

    page: Path
    line: int
    """Of its opening, from 1."""
    language: str
    mark: tuple[str, str] | None
    """(run | config | not run, what follows), from the comment on the line before."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}" if self.page.is_absolute() else str(self.page)


def fences(page: Path) -> Iterator[Fence]:
    """Find the fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").split("\n")
    opening: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opening is None:
            opening = number
            continue
        found = MARK.fullmatch(lines[opening - 1]) if opening else None
        yield Fence(
            page=page,
            line=opening + 1,
            language=lines[opening][3:].strip(),
            mark=(found[1], found[2] or "") if found else None,
            text="\n".join(lines[opening + 1 : number]) + "\n",
        )
        opening = None
    assert opening is None, f"{page}:{opening}: the block has no end"


def indented_blocks(page: Path) -> list[int]:
    """Find code that is indented in place of fenced -> numbers of its first lines."""
    text = re.sub(
        r"```.*?```", lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    lines, found, context = text.split("\n"), [], ""
    for number, line in enumerate(lines):
        if line.startswith("    ") and line.strip() and not lines[number - 1].strip():
            if not re.match(r"([-*]|\d+\.|!!!|\?\?\?) ", context):
                found.append(number + 1)
        elif line.strip() and not line.startswith(" "):
            context = line
    return found


def commands(text: str) -> list[list[str]]:
    """Take a bash block apart -> the words of each command; here-documents and comments are left out."""
    text = re.sub(r"<<'(\w+)'\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    found: list[list[str]] = []
    for line in text.split("\n"):
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", "|", ";"):
                found += [command] if command else []
                command = []
            else:
                command.append(word)
    return found
