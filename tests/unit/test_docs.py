"""Proves that the pages say what the code says: those that are written from it, and every command, setting and line of
Python in the others.

A fenced block is held by its language and by a mark, a comment on the line before it:

    <!-- run: NAME -->        executed by tests/e2e/test_docs_vllm.py after the others of that name; Python, here
    <!-- config: COMMAND -->  YAML of that command
    <!-- not run: REASON -->  why not; what is ours in it is checked all the same

Commands that are not run are parsed: the command, every flag, every value and range, files of this repository. That
they then do what the page says is proved elsewhere.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sppo import config
from megatron_sppo.__main__ import COMMANDS
from megatron_sppo.config_fields import leaves_of
from megatron_sppo.errors import ConfigError
from megatron_sppo.planning.config import read_plan
from tests.fences import PAGES, REPOSITORY, Fence, commands, fences, indented_blocks

DOCS = REPOSITORY / "docs"
FENCES = [fence for page in PAGES for fence in fences(page)]
LANGUAGES = {"bash", "json", "python", "text", "yaml"}
OTHERS = {"cat", "cd", "envsubst", "git", "kubectl", "lm_eval", "pre-commit", "source", "vllm"}
"""Programs that are not ours: their arguments are not looked at."""
OPTIONS_WITH_VALUE = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}


def script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"page_of_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    importlib.import_module("sys").modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SETTINGS, SCRIPTS = (getattr(script("commands"), name) for name in ("COMMANDS", "SCRIPTS"))


@pytest.mark.parametrize("name", ["troubleshooting", "commands", "benchmarks", "alignment", "families"])
def test_a_page_made_from_code_is_what_the_code_says_now(name: str) -> None:
    written = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert written == script(name).page(), f"run: python docs/{name}.py"


def test_every_measured_number_of_the_alignment_page_is_one_of_a_committed_json() -> None:
    """Every decimal fraction on the page: a number in the files, the mean of a list of them, or that in per cent."""
    found: list[float] = []

    def gather(value: object) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                gather(inner)
        elif isinstance(value, list):
            numbers = [one for one in value if isinstance(one, (int, float))]
            found.extend([sum(numbers) / len(numbers)] if numbers else [])
            for inner in value:
                gather(inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(float(value))

    contents = [json.loads(file.read_text()) for file in sorted(REPOSITORY.glob("benchmarks/results/alignment/*.json"))]
    for content in contents:
        gather(content)
        runs = content.get("runs", [])
        for entry in {run["entry"] for run in runs}:  # means over the seeds of an entry
            for column in zip(*(run["iterations"] for run in runs if run["entry"] == entry), strict=True):
                gather([one["win_rate_vs_base"]["mean"] for one in column])
                gather([one["accuracy"]["prompt_level"] for one in column if "accuracy" in one])
    page = re.sub(r"arXiv:\S+|v0\.2|AlpacaEval 2\.0|`[^`]*`", "", (DOCS / "alignment.md").read_text(encoding="utf-8"))
    numbers = re.findall(r"(?<![\w.])-?\d+\.\d+", page)
    assert len(numbers) > 50
    for text in numbers:
        digits = len(text.partition(".")[2])
        assert any(f"{scale * one:.{digits}f}" == text for one in found for scale in (1, 100)), text


def test_what_the_demo_gave_is_said_as_it_was_measured() -> None:
    """The table in the quickstart; in README the last iteration's held instructions beside the start model's."""
    result = json.loads((REPOSITORY / "benchmarks/results/alignment/demo.json").read_text(encoding="utf-8"))
    assert "\n".join(result["table"]) in (DOCS / "quickstart.md").read_text(encoding="utf-8")
    accuracy = result["summary"]["iterations"][-1]["accuracy"]
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").replace("\n> ", "\n").split())
    held, start = (
        "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * accuracy[who]["instruction_level"][key] for key in KEYS))
        for who in ("policy", "base")
    )
    assert f"{held} of the instructions in {accuracy['policy']['instruction_level']['num_prompts']} prompts" in readme
    assert f"the start model {start}" in readme


KEYS = ("mean", "low", "high")


def test_the_page_of_messages_has_every_message() -> None:
    written = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert (
        "(...%) answers were cut at max_tokens: they have no end to be judged by | Use more --max-tokens. |" in written
    )
    assert written.count("\n|") > 300  # a page that finds no messages would agree with itself


def test_the_page_of_commands_has_every_command_and_flag() -> None:
    assert {name.partition(" ")[0] for name in SETTINGS} == set(COMMANDS)

    sections = (DOCS / "commands.md").read_text(encoding="utf-8").split("\n## ")
    for name, kind in SETTINGS.items():
        flags = {f"`--{key.replace('_', '-')}" for key in leaves_of(kind)}
        assert flags <= set(re.findall(r"`--[a-z0-9-]+", "".join(sections))), name
    assert sum(section.count("\n| `--") for section in sections) > 150


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#", "mailto:")):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_files_that_pages_name_are_there() -> None:
    found = 0
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        rooms = r"`((?:tests|megatron_sppo|examples|docs|tools|benchmarks|\.github)/[\w./-]+)`"
        for name in re.findall(rooms, "" if page.name == "troubleshooting.md" else text):
            found += 1
            assert (REPOSITORY / name).exists(), f"{page.name} names {name}"
    assert found > 40


def test_blocks_are_fenced_and_say_what_they_hold() -> None:
    assert len(FENCES) > 60
    for fence in FENCES:
        assert fence.language in LANGUAGES, f"{fence}: {fence.language!r}"
        assert fence.mark is None or fence.mark[0] in ("run", "config", "not run"), fence
    for page in PAGES:
        assert not indented_blocks(page), f"{page.name}: {indented_blocks(page)}"


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language == "bash"], ids=str)
def test_commands_are_ones_that_can_be_typed(fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = commands(fence.text)
    assert found
    for words in found:
        check_command([word for word in words if word != "..."], fence, tmp_path)


def check_command(words: list[str], fence: Fence, tmp_path: Path) -> None:
    """Hold one command against the code; `fence` names it in failures."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert all(word in targets or re.fullmatch(r"[A-Z_]+=\S+", word) for word in rest), fence
    elif Path(program).name in ("python", "python3", "python3.12", "torchrun"):
        check_python(program, rest, fence, tmp_path)
    elif program == "megatron-sppo":
        check_ours(rest, fence, tmp_path)
    elif program == "sbatch":
        assert (REPOSITORY / next(word for word in rest if word.endswith(".sbatch"))).is_file(), fence
    elif program == "pip":
        extras = re.findall(r"^\s{8}\"(\w+)\": \[", (REPOSITORY / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
        for named in re.findall(r"^\.\[([\w,]+)\]", "\n".join(rest), re.MULTILINE):
            assert set(named.split(",")) <= set(extras), fence
    elif program.startswith("benchmarks/"):
        assert (REPOSITORY / program).is_file(), fence
        parts = importlib.import_module("benchmarks.hopper").PARTS
        assert set(rest) <= {*parts, "all"}, fence
    else:
        assert program in OTHERS, f"{fence}: {program} is neither ours nor in OTHERS"


def check_python(program: str, words: list[str], fence: Fence, tmp_path: Path) -> None:
    while words and program == "torchrun" and words[0] in OPTIONS_WITH_VALUE:
        words = words[2:]
    if words[0] == "-m":
        module, words = words[1], words[2:]
        if module == "megatron_sppo":
            check_ours(words, fence, tmp_path)
        elif module == "pytest":
            assert all((REPOSITORY / word).exists() for word in words if word.startswith("tests/")), fence
        else:
            assert module == "venv" or (REPOSITORY / (module.replace(".", "/") + ".py")).is_file(), fence
        return
    assert (REPOSITORY / words[0]).is_file(), f"{fence}: {words[0]} does not exist"
    same = next((SCRIPTS[name] for name in (words[0], " ".join(words[:2])) if name in SCRIPTS), None)
    if same is not None:
        check_ours([*same.split(), *words[1 if words[0] in SCRIPTS else 2 :]], fence, tmp_path)


def check_ours(words: list[str], fence: Fence, tmp_path: Path) -> None:
    """Parse the words behind `megatron-sppo` as the command does; a --config of the reader's own is left out."""
    if words == ["--version"]:
        return
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in SETTINGS), None)
    assert name is not None, f"{fence}: megatron-sppo {words[0]} does not exist"
    argv = words[len(name.split()) :]
    if "--config" in argv and not (REPOSITORY / argv[argv.index("--config") + 1]).is_file():
        place = argv.index("--config")
        settings = tmp_path / "settings.yaml"
        of_self_play = "judge: rules:concise\ntraining: {lr: 1.0e-6}\n"
        settings.write_text("lr: 1.0e-6\n" if name in ("train", "inspect") else of_self_play)
        argv = argv[:place] + (["--config", str(settings)] if name != "plan" else []) + argv[place + 2 :]
    try:
        if name == "plan":
            read_plan(argv, name="plan", description="")
        else:
            config.parse(SETTINGS[name], name=name, description="", argv=argv)
    except ConfigError as error:
        pytest.fail(f"{fence}: megatron-sppo {shlex.join(words)}\n{error}")


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language == "yaml"], ids=str)
def test_yaml_is_a_configuration_of_its_command(fence: Fence, tmp_path: Path) -> None:
    assert fence.mark is not None and fence.mark[0] == "config", f"{fence}: say of which command, <!-- config: ... -->"
    kind = SETTINGS[fence.mark[1]]
    file = tmp_path / "settings.yaml"
    file.write_text(fence.text)
    given = {key for section in yaml.safe_load(fence.text).values() for key in section}
    required = [key for key, leaf in leaves_of(kind).items() if leaf.required and key not in given]
    argv = [f"--{key.replace('_', '-')}=placeholder" for key in required]
    config.parse(kind, name=fence.mark[1], description="", argv=["--config", str(file), *argv])


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language == "python"], ids=str)
def test_python_runs_or_says_why_not(fence: Fence) -> None:
    assert fence.mark is not None and fence.mark[0] in ("run", "not run"), f"{fence}: run it, or say why not"
    tree = ast.parse(fence.text)
    if fence.mark[0] == "run":
        exec(compile(tree, str(fence), "exec"), {"__name__": "page"})  # noqa: S102 (our own pages)
        return
    for node in ast.walk(tree):  # what it takes from us must exist
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_sppo"):
            module: Any = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), fence


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language == "json"], ids=str)
def test_json_can_be_read(fence: Fence) -> None:
    json.loads(fence.text)


def test_a_wrong_flag_or_command_on_a_page_is_found(tmp_path: Path) -> None:
    fence = Fence(page=Path("x.md"), line=1, language="bash", mark=None, text="")
    for wrong in (
        "megatron-sppo rollout --model m",
        "megatron-sppo report --runs runs/demo",
        "megatron-sppo train --load a --data b --save c --lr 1e-6 --eta nan",
        "python tools/report.py --runs runs/demo",
        "torchrun --nproc-per-node 2 -m megatron_sppo train --load a --data b --save c",
        "python tools/reports.py --run runs/demo",
        "make dmo",
        "pip install -e .[judges]",
        "curl x",
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_command(shlex.split(wrong), fence, tmp_path)
