"""Whether the layouts of tests/distributed must run again: what they stand on, against what they last passed with.

    python -m tests.layout_runs holds every|cover               exit code 0: it has not changed
    python -m tests.layout_runs sources                         what it is: two hashes
    python -m tests.layout_runs passed every|cover HASH HASH    note what it was, in layout_runs.json (commit it)

Every layout must run again where training, model, data, planning or the range of megatron-core changed, their cover
(the pairs of choices that a change is tested under) where anything did that a test of several ranks imports. Where
neither must, the first case of each test runs.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

from tests.imports import REPOSITORY, with_imports

NOTED = Path(__file__).with_name("layout_runs.json")
ROOMS = ("training", "model", "data", "planning")
BY_PATH = ("examples/pretrain_sppo.py", "tools/inspect_log_ratio.py", "tests/conftest.py")
"""What tests of several ranks stand on without an import of it."""
READ = ("examples/configs/llama3_70b_h100.yaml",)
KINDS = ("every", "cover")


def sources(root: Path) -> dict[str, str]:
    """Hash what each kind of run stands on, by names and bytes -> {kind: hex}."""
    rooms = {path for room in ROOMS for path in (root / "megatron_sppo" / room).rglob("*.py")}
    started = [*(root / "tests/distributed").glob("*.py"), *(root / name for name in BY_PATH)]
    read = {root / name for name in READ}
    return {"every": _hash(rooms, root), "cover": _hash(with_imports(started, root) | read, root)}


def _hash(files: set[Path], root: Path) -> str:
    (pin,) = re.findall(r"megatron-core>=[^\"]+", (root / "setup.py").read_text(encoding="utf-8"))
    digest = hashlib.sha256(pin.encode())
    for path in sorted(files):
        digest.update(f"\n{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def holds(kind: str, now: dict[str, str], noted: Path) -> bool:
    """Whether a kind of run has passed with these sources."""
    return noted.is_file() and json.loads(noted.read_text(encoding="utf-8"))[kind] == now[kind]


def note(kind: str, then: dict[str, str], noted: Path) -> None:
    """Note that a kind of run has passed with these sources; a run of every layout has the cover among them."""
    found = dict.fromkeys(then, "") | (json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {})
    found |= then if kind == "every" else {kind: then[kind]}
    noted.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Answer, or note."""
    parser = argparse.ArgumentParser(prog="python -m tests.layout_runs", description="Whether layouts must run again.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sources")
    kinds = {name: commands.add_parser(name) for name in ("holds", "passed")}
    for command in kinds.values():
        command.add_argument("kind", choices=KINDS)
    for kind in KINDS:
        kinds["passed"].add_argument(kind)
    given = parser.parse_args()
    if given.command == "passed":
        note(given.kind, {kind: getattr(given, kind) for kind in KINDS}, NOTED)
        return 0
    now = sources(REPOSITORY)
    if given.command == "holds":
        return 0 if holds(given.kind, now, NOTED) else 1
    print(*(now[kind] for kind in KINDS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
