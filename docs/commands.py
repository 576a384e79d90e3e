"""Write docs/commands.md: every flag of every command, from the dataclasses that the command line is made of.

python docs/commands.py              # tests/unit/test_docs.py fails where the page is not what this writes
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sppo.commands import convert, evaluate, import_preferences, report, rollouts, score, self_play
from megatron_sppo.commands import inspect as inspection
from megatron_sppo.config import Range, SettingsOf
from megatron_sppo.planning.config import PlanConfig
from megatron_sppo.training.config import TrainingConfig

PAGE = Path(__file__).with_suffix(".md")
COMMANDS: dict[str, type[Any]] = {
    **{f"convert {name}": kind for name, kind in convert.COMMANDS.items()},
    "rollouts": rollouts.Command,
    "score": score.Command,
    "train": TrainingConfig,
    "self-play": self_play.Command,
    "evaluate": evaluate.Command,
    "report": report.ReportConfig,
    "plan": PlanConfig,
    "inspect": inspection.Command,
    "import-preferences": import_preferences.Command,
}
"""What can be typed after `megatron-sppo` -> its settings."""
SCRIPTS = {
    "tools/convert.py import": "convert import",
    "tools/convert.py export": "convert export",
    "tools/convert.py verify": "convert verify",
    "tools/convert.py compare": "convert compare",
    "tools/generate_rollouts.py": "rollouts",
    "tools/score_pairrm.py": "score",
    "examples/pretrain_sppo.py": "train",
    "tools/self_play.py": "self-play",
    "tools/evaluate.py": "evaluate",
    "tools/report.py": "report",
    "tools/plan.py": "plan",
    "tools/inspect_log_ratio.py": "inspect",
    "tools/import_preferences.py": "import-preferences",
}
"""Scripts of the repository -> the command that they are."""
SUMMARIES = {
    "rollouts": "Sample K answers for each prompt with vLLM: prompts in, a rollout directory out.",
    "score": "Judge rollouts pair by pair: a rollout directory in, a preference dataset out. Under torchrun the ranks "
    "take shards from one list.",
    "self-play": "Align a model by self-play: rollouts, preferences, training and evaluation, iteration by iteration.",
    "evaluate": "Compare answers by a judge: a policy's with its base's and predecessor's, or all players' with each "
    "other.",
    "report": "Write one self-contained report.html of a self-play run, from its directory alone.",
    "plan": "Plan a run before it is started: memory of each rank, FLOPs, time and traffic, and whether it fits. It "
    "needs no GPU. The file of `--config` may be one of `train` or of `self-play`.",
    "inspect": "Show, token by token, how a policy differs from the one that it was trained from (equation 3.11). It "
    "takes every setting of `train`, so that `--config SAVE/config.yaml` repeats its precision and packing.",
    "import-preferences": "Turn preference data of other projects into rollouts and the matrices that they come with.",
}
HEAD = """# Commands

`megatron-sppo COMMAND [flags]`; `python -m megatron_sppo COMMAND [flags]` is the same, and what torchrun takes:
`torchrun --nproc-per-node 8 -m megatron_sppo train ...`. `megatron-sppo --version` prints the versions of
everything that matters.

Every command takes `--help`, `--debug` (shows tracebacks) and `--config FILE.yaml`: the same settings in
snake_case, grouped by the sections below or flat. The command line wins over the file, the file over the defaults;
unknown keys are errors. A switch such as `--packing` is turned off by `--no-packing`; a flag that takes several
values takes them one after the other. What several commands share is written once: a section that stood above is
linked.

Exit codes: 0 done, 2 bad input (the last line on stderr says what, and how to fix it), 3 a rank computes wrongly, 4 a
rank hangs, 1 a fault of the program, 130 interrupted, 143 stopped by SIGTERM after a checkpoint.

This page is written by `docs/commands.py` from the code itself.
"""


def documents(kind: type[Any]) -> dict[str, str]:
    """Read the texts below a dataclass's fields, those that it inherits too -> {field: text}."""
    found: dict[str, str] = {}
    for owner in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = getattr(getattr(following, "value", None), "value", None)
                if isinstance(text, str):
                    found[statement.target.id] = " ".join(text.split())
    return found


def ranges(annotation: Any) -> Iterator[Range]:
    """Find the ranges of numbers in an annotation."""
    if typing.get_origin(annotation) is Annotated:
        yield from (mark for mark in typing.get_args(annotation) if isinstance(mark, Range))
    for part in typing.get_args(annotation):
        yield from ranges(part)


def is_of_another_command(annotation: Any) -> bool:
    """Whether one flag takes all settings of another command."""
    return any(isinstance(mark, SettingsOf) for mark in typing.get_args(annotation))


def value_of(annotation: Any) -> str:
    """Word what a flag takes -> such as "N", "PATH", "{a,b}" or, of several, "X ..."."""
    if is_of_another_command(annotation):
        return "NAME=VALUE ..."
    if typing.get_origin(annotation) is Annotated:
        return value_of(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        member = next(part for part in typing.get_args(annotation) if part is not type(None))
        return "{true,false}" if member is bool else value_of(member)
    if typing.get_origin(annotation) is Literal:
        return f"{{{','.join(map(str, typing.get_args(annotation)))}}}"
    if typing.get_origin(annotation) in (tuple, list):
        return f"{value_of(typing.get_args(annotation)[0])} ..."
    return {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}[annotation]


def default_of(field: "dataclasses.Field[Any]", section: Any) -> str:
    """Word a default, a section's own where it has one -> Markdown."""
    if section is not dataclasses.MISSING:
        value = getattr(section, field.name)
    elif field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "**required**"
    if value is None or value == () or dataclasses.is_dataclass(value):
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:.10g}`" if isinstance(value, (int, float)) else f"`{value}`"


def sections(
    kind: type[Any], default: Any = dataclasses.MISSING, path: str = ""
) -> Iterator[tuple[str, type[Any], list[str]]]:
    """Lay a config out -> (section or "", its class, lines of its table), nested sections after their owner."""
    hints, texts, lines, inner = typing.get_type_hints(kind, include_extras=True), documents(kind), [], []
    for field in dataclasses.fields(kind):
        annotation = hints[field.name]
        plain = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
        if dataclasses.is_dataclass(plain) and not is_of_another_command(annotation):
            assert isinstance(plain, type)
            has_factory = field.default_factory is not dataclasses.MISSING
            inner.append((field.name, plain, field.default_factory() if has_factory else dataclasses.MISSING))
            continue
        flag = f"--{field.name.replace('_', '-')} {value_of(annotation)}".strip()
        held = "".join(f" In {found}." for found in ranges(annotation) if found.most < 2**31 - 1)
        text = (texts.get(field.name, "") + held).strip().replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{flag}` | {default_of(field, default)} | {text} |")
    yield path, kind, lines
    for name, section, value in inner:
        yield from sections(section, value, name)


def page() -> str:
    """Write the whole page -> Markdown."""
    parts, first_use = [HEAD], {}
    for command, kind in COMMANDS.items():
        parts.append(f"## {command}\n")
        parts.append(SUMMARIES.get(command) or (kind.__doc__ or "").strip().partition("\n\n")[0])
        scripts = [script for script, same in SCRIPTS.items() if same == command]
        parts.append(f"\nAlso `python {scripts[0]}`.\n")
        for name, section, lines in sections(kind):
            key = (section, tuple(lines))
            if name and key in first_use:
                parts.append(f"Section `{name}`: [as in `{first_use[key]}`](#{anchor(first_use[key])}).\n")
                continue
            if name:
                first_use[key] = command
                summary = (section.__doc__ or "").strip().partition("\n")[0]
                parts.append(f"Section `{name}`: {summary[:1].lower() + summary[1:]}\n")
            if lines:
                parts.append("| flag | default | meaning |\n|---|---|---|\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def anchor(command: str) -> str:
    """Spell a heading's anchor as both MkDocs and GitHub do."""
    return command.replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
