"""Write docs/troubleshooting.md: every line that a command can end with or warn by, taken from the code that says it.

python docs/troubleshooting.py            # tests/unit/test_docs.py fails where the page is not what this writes
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/troubleshooting.md"
KINDS = {
    **dict.fromkeys(("ConfigError", "DataError", "ConversionError", "MachineError", "StageFailed"), "line"),
    **dict.fromkeys(("UnusablePrompt", "UnusableRow", "UnreadableGroup", "RowRefused"), "row set aside because"),
    "Unproven": "server left out because",
    "warning": "warning",
}
"""How a message is given, by the exception or the logger's method that takes it -> heading of its table."""
WARNING_TABLES = frozenset({"_WARNINGS"})
"""Names of tables whose sentences end shares that a warning says."""
ROOMS = {
    "training": "Training (`megatron-sppo train`)",
    "model": "The model's layers and precision",
    "conversion": "Conversion (`megatron-sppo convert`)",
    "checkpoints": "Models' files: Hugging Face directories, Megatron checkpoints, tokenizers",
    "verification": "Verification (`megatron-sppo convert verify`)",
    "rollout": "Prompts and rollouts (`megatron-sppo rollouts`, `import-preferences`)",
    "judge": "Judges and scoring (`megatron-sppo score`, `evaluate`)",
    "evaluation": "Comparing players (`megatron-sppo evaluate --players`, `--run`)",
    "cluster": "Workers and clusters (`--workers`, `--ray`)",
    "tracking": "Trackers (`--tracker`)",
    "data": "Datasets",
    "objective": "The objective",
    "selfplay": "Self-play (`megatron-sppo self-play`)",
    "planning": "Planning (`megatron-sppo plan`)",
    "report": "The report (`megatron-sppo report`)",
    "commands": "The commands' own settings",
    "": "All commands: command line, files, locks",
}
HEAD = """# Troubleshooting: every message, and what to do

Each command ends with one line on stderr: `COMMAND: error: FACT. REMEDY.` Search this page for a few words of the
fact; `...` stands for names and numbers. Exit code 2 means that you can fix it; 3 that a machine computes wrongly and 4
that one hangs, which the line names; 1 is a fault of the program, with a traceback: please report it with the command,
`megatron-sppo --version` and the last line. `--debug` shows where a line comes from.

A *line* ends a command. A *warning* does not: the run goes on, and says so because the result may not be what you want.
A *row set aside* is named in the manifest's `quarantined` with its reason, and counted; the other rows go on.
A *server left out* is not sampled from; the warning that says so gives its reason. Others do its work, and where there
are none the command ends.

This page is written by `docs/troubleshooting.py` from the code itself.
"""


def text_of(node: ast.AST, constants: dict[str, str]) -> str | None:
    """Read a message -> text with `...` for what is filled in; None where it is no literal.

    Args:
        constants: texts that the file has under a name.
    """
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, constants)
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) or "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left, constants) or "...") + (text_of(node.right, constants) or "...")
    if isinstance(node, ast.IfExp):
        return text_of(node.body, constants)
    return None


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield what a file can say -> (how, message)."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for table in module.body:  # facts with their remedy that a file words elsewhere: their texts are sentences
        if isinstance(table, ast.Assign) and getattr(table.targets[0], "id", "") in WARNING_TABLES:
            for node in ast.walk(table.value):
                if isinstance(text := getattr(node, "value", None), str) and " " in text:
                    yield "warning", f"... of ... (...%) {text}."
    for function in ast.walk(module):  # a text's fault, of which others make the reason why a row is set aside
        if isinstance(function, ast.FunctionDef) and function.name == "text_fault":
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and (text := text_of(node.value or node, constants)):
                    yield "row set aside because", f"the ... {text}"
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        if name in KINDS and (text := text_of(node.args[0], constants)):
            text = re.sub(r"%[.\d]*[a-z]", "...", text) if name == "warning" else text
            text = re.sub(r"(\.\.\.[,'\"()\[\]:/ ]+){2,}(?=\.\.\.)", "", " ".join(text.split()))
            if len(re.sub(r"[^a-z]", "", text)) > 8:  # more than what is filled in
                yield KINDS[name], text


OTHERWISE = {
    "line": "what the line itself says, which depends on the case; else correct what it names",
    "row set aside because": "correct the row in its source, or leave it out",
    "server left out because": "see the server's own log",
    "warning": "nothing, if it is what you want",
}


def entry(kind: str, text: str) -> str:
    """Word one message -> a line of the page: the fact, and what to do."""
    parts = re.split(r"(?<=\S)(?<!\.\.)\. (?=[A-Z`-]|tools/)|(?<=\.\.\.\.) (?=[A-Z`-])", text, maxsplit=1)
    fact, remedy = parts[0], parts[1] if len(parts) > 1 else OTHERWISE[kind]
    if fact.endswith(".") and (not fact.endswith("...") or fact.endswith("....")):
        fact = fact[:-1]
    return f"| {fact} | {remedy} |".replace("\\n", " ")


def page() -> str:
    """Write the whole page -> Markdown."""
    found: dict[str, set[tuple[str, str]]] = {room: set() for room in ROOMS}
    package = REPOSITORY / "megatron_sppo"
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).parts
        found[inside[0] if len(inside) > 1 else ""].update(messages(path))
    text = [HEAD]
    for room, title in ROOMS.items():
        text.append(f"\n## {title}\n")
        for kind in dict.fromkeys(KINDS.values()):
            if lines := sorted(
                {entry(kind, message.replace("|", "\\|")) for how, message in found[room] if how == kind}
            ):
                text.append(f"| {kind} | what to do |\n|---|---|\n" + "\n".join(lines) + "\n")
    return "\n".join(text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
