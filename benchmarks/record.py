"""What every figure shares: rows in one JSON form, the machine in words, repeats that alternate, memory of a child."""

import datetime
import multiprocessing
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_sppo.json_files import write_json
from megatron_sppo.training.telemetry import GpuSampler

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: ours beside a peer's, and whether the target is met."""

    id: str
    """Number of the figure, such as C1."""
    metric: str
    """What is compared, with its unit and the settings that matter."""
    ours: float | None
    peer: float | None
    peer_name: str
    ratio: float | None
    """The number that the target speaks of."""
    target: str | None
    """None for a row that stands beside others and has no target of its own."""
    met: bool | None
    """None exactly where `target` is."""
    spread: list[float] | None = None
    """Least and greatest ratio over the repeats."""

    def __post_init__(self) -> None:
        assert (self.met is None) == (self.target is None), f"{self.metric}: target {self.target}, met {self.met}"


def figure(
    number: str,
    metric: str,
    ours: float | None,
    peer: float | None,
    peer_name: str,
    ratio: float | None,
    target: str | None,
    met: bool | None,
    spread: list[float] | None = None,
) -> Row:
    """Make a row from its values in their order; `partial(figure, "G1")` makes those of one figure."""
    return Row(
        id=number,
        metric=metric,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        ratio=ratio,
        target=target,
        met=met,
        spread=spread,
    )


def write_results(name: str, rows: Sequence[Row], *, machine: str, packages: Sequence[str]) -> Path:
    """Write benchmarks/results/<machine>/<name>.json, print the rows -> its path."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]  # no paths of this machine
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words]
    path = RESULTS / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version()} | {package: metadata.version(package) for package in packages}
    write_json(
        path,
        {
            "benchmark": name,
            "command": shlex.join(command),
            "machine": machine,
            "gpu": describe_gpu(),
            "versions": versions,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "rows": [asdict(row) for row in rows],
        },
    )
    for row in rows:
        spread = "" if row.spread is None else f" [{row.spread[0]:.3g}, {row.spread[1]:.3g}]"
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        ours, peer, ratio = ("-" if x is None else f"{x:.4g}" for x in (row.ours, row.peer, row.ratio))
        target = "" if row.target is None else f" ({row.target})"
        print(f"{row.id:3} {row.metric}: ours {ours}, {row.peer_name} {peer}; {ratio}{spread}{target} {verdict}")
    print(path)
    return path


def describe_cpu() -> str:
    """Name this machine by its processor -> such as "cpu-amd-epyc-2core"; no host name."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2]
            break
    words = [word for word in model.lower().replace("(r)", "").replace("(tm)", "").split() if word.isalnum()]
    return "-".join(["cpu", *words[:3], f"{multiprocessing.cpu_count()}core"])


def describe_machine() -> str:
    """Name this machine by its GPU, such as "h200", or by its processor where it has none."""
    import torch

    if not torch.cuda.is_available():
        return describe_cpu()
    words = torch.cuda.get_device_name().lower().replace("nvidia", "").split()
    return words[0] if words else "gpu"


def describe_gpu() -> dict[str, Any] | None:
    """Say what GPU figures come from -> its name, memory and limits; None where torch finds none.

    Driver, power limit and clock are NVML's, and null where that is denied, as in many containers.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = round(properties.total_memory / 2**30, 1)
    return {"name": properties.name, "memory_gib": memory, **GpuSampler().limits()}


def alternate_seconds(runs: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Time each function `repeats` times in turns -> wall seconds, the GPU's work included; call each once before."""
    import torch

    def finished() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            begin = finished()
            runs[name]()
            seconds[name].append(finished() - begin)
            print(f"    {name}: {seconds[name][-1]:.4f} s", flush=True)
    return seconds


def alternate(runs: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Time each function `repeats` times in turns -> CPU seconds of this process, by name. Call each once before.

    A slow spell of a shared machine falls on all of them alike; every other turn goes backwards. CPU time leaves out
    the waiting for a core that others hold; with one thread (OMP_NUM_THREADS=1) it is a quiet machine's wall time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            begin = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - begin)
            print(f"    {name}: {seconds[name][-1]:.2f} CPU seconds", flush=True)
    return seconds


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, list[float]]:
    """Compare two series taken in turns -> ratio of the medians; least and greatest ratio of a turn."""
    turns = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return statistics.median(numerator) / statistics.median(denominator), [min(turns), max(turns)]


def peak_in_child(function: Callable[..., tuple[int, int]], *arguments: Any) -> tuple[int, int]:
    """Run `function(*arguments)` in a fresh process -> what it returns, its (bytes before, peak bytes)."""
    peak: tuple[int, int] = in_child(function, *arguments, start_method="spawn")
    return peak


def in_child(function: Callable[..., Any], *arguments: Any, start_method: str) -> Any:
    """Run a function in a process whose memory and seconds are its own -> its result.

    Args:
        start_method: "spawn", a fresh one; "fork", one that has all imports.

    Raises:
        RuntimeError: the process ended without one.
    """
    context: Any = multiprocessing.get_context(start_method)
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sending, function, arguments))
    child.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"{function.__name__}{arguments} died with exit code {child.exitcode}") from None
    finally:
        child.join()


def _send(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(function(*arguments))


def peak_of(function: Callable[[], object]) -> tuple[int, int]:
    """Run `function` -> (resident bytes before, peak resident bytes), of this process.

    The kernel's high-water mark is reset first. `ru_maxrss` would not do: a child inherits its parent's.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    function()
    return before, _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
