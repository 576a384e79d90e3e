"""Figures C3 (CPU) and G3 (GPU): tokens trained per second: ours, TRL's DPOTrainer, the official SPPO maths.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0       # the peers' own environment
    OMP_NUM_THREADS=1 python -m benchmarks.train_throughput --peer-python trl/bin/python             C3
    python -m benchmarks.train_throughput --peer-python PYTHON --setup h100 [--part fit|curve]       G3
    python -m benchmarks.train_throughput --peer-python trl/bin/python --setup dry [--part fit|curve]     G3's way

A random Llama, pairs of random tokens with chat-like lengths (benchmarks/head.py), AdamW, loss sppo_hard. C3: 22
million parameters, float32, two data-parallel ranks. G3: the shape of Llama-3.2-1B, one rank; ours in bfloat16 with
float32 master weights through Transformer Engine, TRL's in bfloat16 autocast over float32 weights. Same weights and
global batches for all: their losses are first checked equal (G3: those of four steps in float32). Then the trainers
take turns. Seconds are CPU seconds of the slower rank (G3: wall time, without what compiles kernels) of each step, and
of the reference pass, whose cost ours and TRL pay once; the official code runs its reference model in every step. In C3
ours also runs with both answers of a pair behind one copy of their prompt: the same losses. Real tokens are those of
prompts and answers. `--part fit` looks for the largest micro-batch that trains: pairs are doubled until memory runs
out, then tried half-way between. `--part curve` trains ours in bfloat16 and in FP8 (dry: in float32) on the same
batches and compares the losses.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.head import draw_lengths
from benchmarks.record import Row, describe_machine, figure, ratio_of_medians, write_results
from benchmarks.train_gpu import SHAPES
from benchmarks.train_peers import now
from megatron_sppo.command_line import launch
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.conversion.hf_config import hf_from_architecture
from megatron_sppo.data.steps import epoch_order
from megatron_sppo.data.writer import DatasetWriter
from megatron_sppo.tracking.run import TrackedRun

NAME = "train_throughput.py"
SEED = 1234
END = 2
"""Id of the end-of-sequence token."""
SMALL = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
OURS = "ours"
SHARED = "ours, prompts computed once"
TRL = "TRL DPOTrainer sppo_hard"
OFFICIAL = "official SPPO's maths"
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("", {}),
    SHARED: ("", {"more_flags": "--packed-sequence-size 2048 --share-prompts"}),
    TRL: ("trl", {}),
    f"{TRL}, grouped by length": ("trl", {"group_by_length": True}),
    f"{TRL}, Liger's kernels": ("trl", {"liger": True}),
    f"{TRL}, Liger's kernels, grouped by length": ("trl", {"liger": True, "group_by_length": True}),
    OFFICIAL: ("official", {}),
}
"""Command of train_peers.py (none for ours), and its settings, by name."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where and at what size trainers are compared."""

    figure: str
    file: str
    model: dict[str, Any]
    ranks: int
    device: Literal["cpu", "cuda"]
    precision: str
    flags: str
    """Ours, beside those that all setups share."""
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    targets: dict[str, float]
    """By command of the peer: ours over the peer's tokens a second."""
    lr: float
    tolerance: float
    """Of the losses, relative."""
    checked: dict[str, Any]
    """Settings of the runs whose losses are held against each other, in float32; empty: the timed runs are."""
    warm_up: int
    """First steps that are not timed."""
    other_precision: tuple[str, str]
    """Name and flags of what `--part curve` compares ours with."""


_TRL = tuple(name for name in TRAINERS if name.startswith(TRL))
_H100 = Setup(
    figure="G3",
    file="train_throughput_1b",
    model=hf_from_architecture(SHAPES["1b"], dtype="bfloat16"),
    ranks=1,
    device="cuda",
    precision="bfloat16",
    flags="--params-dtype bfloat16 --transformer-impl transformer_engine",
    ours=(OURS,),
    peers=_TRL,
    targets={"trl": 2.0},
    lr=1e-6,
    tolerance=1e-3,
    # Not the timed runs: of weights rounded to bfloat16 a few steps of 1e-6 move none, of TRL's float32 copies some.
    checked={"lr": 1e-4, "flags": "--params-dtype float32 --transformer-impl torch", "float32": True},
    warm_up=2,
    other_precision=("FP8 tensorwise", "--fp8 hybrid --fp8-recipe tensorwise"),
)
SETUPS = {
    "cpu": Setup(
        figure="C3",
        file="train_throughput",
        model=SMALL,
        ranks=2,
        device="cpu",
        precision="float32",
        # Memory is no matter at this size: no logits are computed twice, as no peer does.
        flags="--params-dtype float32 --head-chunk-size 4096",
        ours=(OURS, SHARED),
        peers=(TRL, f"{TRL}, grouped by length", OFFICIAL),
        targets={"trl": 1.8, "official": 2.2},
        lr=1e-4,
        tolerance=1e-3,
        checked={},
        warm_up=0,
        other_precision=("bfloat16", "--params-dtype bfloat16"),
    ),
    "h100": _H100,
    "dry": replace(
        _H100,
        file="train_throughput_dry",
        model=hf_from_architecture(SHAPES["tiny"], dtype="bfloat16"),
        device="cpu",
        flags="--params-dtype bfloat16",
        peers=_TRL[:2],
        other_precision=("float32", "--params-dtype float32"),
    ),
}
CHECKED_STEPS = 4
MORE_TOKENS = 3.0
"""Target of `--part fit`."""
CURVE_EPOCHS, CURVE_LR, CURVE_BOUND = 4, 1e-5, 0.05
"""Of `--part curve`: losses of both precisions differ by at most this, relative, and fall by twice as much."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Size of the comparison."""

    peer_python: Path
    """Python of the peers' environment."""
    setup: Literal["cpu", "h100", "dry"] = "cpu"
    part: Literal["speed", "fit", "curve"] = "speed"
    """Tokens a second, the largest micro-batch that trains (one rank), or the losses in two precisions."""
    steps: int = 10
    pairs_per_rank: int = 4
    """Pairs in a step, for each rank; the peers' per-device batch."""
    repeats: int = 5
    """Measured turns of each trainer."""
    eta: float = 10.0
    most_pairs: int = 512
    """Where `--part fit` stops if memory does not run out."""
    machine: str | None = None
    """Folder under benchmarks/results; None names the GPU or the processor."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every trainer is given."""

    hf: Path
    megatron: Path
    data: Path
    pairs: Path


def make_model(config: ThroughputConfig, root: Path) -> tuple[Path, Path]:
    """Write the model in both forms -> (Hugging Face's, Megatron's)."""
    model = SETUPS[config.setup].model
    subprocess.run([str(config.peer_python), str(_peers()), "model", str(root / "hf"), json.dumps(model)], check=True)
    import_checkpoint(root / "hf", root / "megatron")
    return root / "hf", root / "megatron"


def write_pairs(models: tuple[Path, Path], root: Path, num_pairs: int, *, vocab_size: int) -> Workload:
    """Write pairs, as a dataset of ours and as JSON lines in the order in which ours visits them."""
    root.mkdir()
    prompts, responses = draw_lengths(num_pairs, np.random.default_rng(11))
    generator = np.random.default_rng(12)

    def draw(length: int) -> list[int]:
        return generator.integers(3, vocab_size, length).tolist()

    pairs = [
        {
            "prompt": draw(int(prompts[2 * i])),
            "chosen": [*draw(int(responses[2 * i]) - 1), END],
            "rejected": [*draw(int(responses[2 * i + 1]) - 1), END],
        }
        for i in range(num_pairs)
    ]
    with DatasetWriter(
        root / "data",
        num_responses=2,
        tokenizer_hash=None,
        vocab_size=vocab_size,
        judge="rules:concise",
        preset="paper",
        selection="all",
        rollouts_sha256=None,
    ) as writer:
        for pair in pairs:
            logits = np.array([[0, 2], [-2, 0]], dtype=np.float32)
            writer.append(pair["prompt"], [pair["chosen"], pair["rejected"]], logits)
    visited = [pairs[i] for i in epoch_order(num_pairs, seed=SEED, epoch=0)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in visited), encoding="ascii")
    return Workload(hf=models[0], megatron=models[1], data=root / "data", pairs=root / "pairs.jsonl")


def prepare(config: ThroughputConfig, root: Path) -> Workload:
    """Write the model, and pairs for all steps."""
    setup = SETUPS[config.setup]
    num_pairs = config.steps * setup.ranks * config.pairs_per_rank
    return write_pairs(make_model(config, root), root / "pairs", num_pairs, vocab_size=setup.model["vocab_size"])


def train(
    name: str, config: ThroughputConfig, work: Workload, output: Path, *, pairs: int, **further: Any
) -> dict[str, Any]:
    """Train once -> losses; seconds on the critical path: of the reference pass, of each step; tokens of each step.

    Args:
        name: of TRAINERS.
        pairs: of a rank's micro-batch, which is its share of the step.
        further: settings of ours in place of the setup's: lr, epochs, more_flags.

    Raises:
        OutOfMemory: of the GPU.
        RuntimeError: the trainer failed otherwise.
    """
    setup = SETUPS[config.setup]
    command, choices = TRAINERS[name]
    settings = {
        "eta": config.eta,
        "lr": setup.lr,
        "pairs_per_rank": pairs,
        "device": setup.device,
        "ranks": setup.ranks,
        "flags": setup.flags,
        "epochs": 1,
        "group_by_length": False,
        "liger": False,
        "float32": False,
        "more_flags": "",
        **choices,
        **further,
    }
    if command:
        python, script = str(config.peer_python), str(_peers())
        arguments = [command, str(work.hf), str(work.pairs), str(output), json.dumps(settings)]
    else:
        python, script = sys.executable, str(Path(__file__))
        arguments = ["rank", str(work.megatron), str(work.data), str(output), json.dumps(settings)]
    _forget_reference(work.data)  # an earlier run's: each pays for its own
    launcher = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setup.ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(f"{output}.log", "wb") as log:
        done = subprocess.run([*launcher, script, *arguments], env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        text = Path(f"{output}.log").read_text(errors="replace")
        if "out of memory" in text.lower():
            raise OutOfMemory(name)
        raise RuntimeError(f"{name} failed:\n{text[-4000:]}")
    ranks = [json.loads((output / f"rank_{rank}.json").read_text()) for rank in range(setup.ranks)]
    result = {
        "losses": ranks[0]["losses"],
        "reference": max(rank["reference"] for rank in ranks),
        "steps": [max(times) for times in zip(*(rank["steps"] for rank in ranks), strict=True)],
        "tokens": [round(sum(tokens)) for tokens in zip(*(rank["tokens"] for rank in ranks), strict=True)],
        "peak": max(rank.get("peak", 0) for rank in ranks),
    }
    print(
        f"    {name}: reference {result['reference']:.1f}, steps {sum(result['steps']):.1f} seconds of the slower "
        f"rank, the median step {statistics.median(result['steps']):.3f}, {sum(result['tokens'])} tokens, "
        f"peak {result['peak'] / 2**30:.1f} GiB",
        flush=True,
    )
    return result


def _forget_reference(data: Path) -> None:
    """Remove the reference pass's results, which are kept beside the data."""
    for path in data.glob("reference.*"):
        path.unlink()


class OutOfMemory(Exception):
    """The GPU's memory does not hold the micro-batch."""


def rank_main(megatron: str, data: str, output: str, settings: dict[str, Any]) -> None:
    """Train as examples/pretrain_sppo.py does, with a clock between the steps (a rank that torchrun started)."""
    from megatron_sppo.training import checkpoint, inputs, loop, parallel, reference
    from megatron_sppo.training.ahead import ahead
    from megatron_sppo.training.config import TrainingConfig
    from megatron_sppo.training.optimizer import build_optimizer, build_scheduler
    from megatron_sppo.training.policy import build_policy
    from megatron_sppo.training.progress import Progress, resume_key
    from megatron_sppo.training.saving import Saver
    from megatron_sppo.training.stopping import StopRequest

    class Unsaved(Saver):
        def save(self, *, wait: bool) -> Path:
            return source

    share = 2 * settings["pairs_per_rank"]
    argv = (
        f"--load {megatron} --data {data} --save {output}/run --objective sppo_hard --eta {settings['eta']} "
        f"--micro-batch-size {share} --global-batch-size {settings['ranks'] * share} --seed {SEED} "
        f"--lr {settings['lr']} --lr-decay-style constant --clip-grad 0 --no-tensorboard "
        f"--num-epochs {settings['epochs']} {settings['flags']} {settings['more_flags']}"
    )
    clock = partial(now, settings["device"])
    config = parse(TrainingConfig, name=NAME, description="", argv=argv.split())
    source, architecture, tokenizer = inputs.open_source(config)
    dataset = inputs.open_dataset(config, architecture, tokenizer)
    batches = inputs.list_batches(config, dataset, architecture)
    inputs.prepare_save_directory(config)
    parallel.initialize(config.parallel, seed=config.batch.seed)
    policy = build_policy(architecture, config.model, config.parallel)
    checkpoint.load_weights(policy, source)
    optimizer = build_optimizer(policy.chunks, config.optimization, config.model, config.parallel)
    scheduler = build_scheduler(optimizer, config.optimization, train_iters=batches.train_iters)
    progress = Progress(resume_key=resume_key(batches, config))
    progress.reference = reference.fingerprint(policy, dataset, batches, config)
    stop = StopRequest()
    compute = partial(reference.load_or_compute, policy, dataset, batches, progress.reference, config=config, stop=stop)
    if settings["device"] == "cuda":  # compiles kernels
        compute()
        _forget_reference(Path(data))
    begin = clock()
    reference_GK = compute()
    result: dict[str, Any] = {"reference": clock() - begin, "steps": [], "tokens": []}

    def clocked() -> Iterator[Any]:
        begin = clock()
        with ahead(batches.steps(first=1, last=batches.train_iters, reference_GK=reference_GK)) as plans:
            for plan in plans:
                yield plan
                result["tokens"].append(plan.num_tokens / settings["ranks"])  # a prompt counts as often as its answers
                result["steps"].append(clock() - begin)
                begin = clock()

    loop.train(
        policy,
        optimizer,
        scheduler,
        clocked(),
        config=config,
        train_iters=batches.train_iters,
        progress=progress,
        saver=Unsaved(config.save, policy, optimizer, scheduler, progress=progress, source=source),
        stop=stop,
        tracked=TrackedRun({}),
    )
    rank = launch().rank
    if rank == 0:
        lines = Path(output, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        result["losses"] = [json.loads(line)["loss"] for line in lines]
    if settings["device"] == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated()
    Path(output, f"rank_{rank}.json").write_text(json.dumps(result), encoding="ascii")
    parallel.shut_down()


def check_losses(losses: dict[str, list[float]], tolerance: float) -> float:
    """Refuse to compare speeds of trainers whose loss curves differ by more than `tolerance` -> the difference.

    Those that group by length have batches of their own, and are not looked at.
    """
    worst = 0.0
    for name, curve in losses.items():
        if "grouped" in name:
            continue
        apart = np.abs(np.array(curve) / np.array(losses[OURS]) - 1).max()
        print(f"    {name}: losses {curve[0]:.4f} .. {curve[-1]:.4f}, differ by {apart:.2g}", flush=True)
        worst = max(worst, float(apart))
    assert worst <= tolerance, f"losses differ by {worst:.2g}"
    return worst


def check_in_float32(config: ThroughputConfig, work: Workload, root: Path, peers: list[str]) -> float:
    """Train a few steps in float32 and compare the losses -> the difference; `compare` names the peers that cannot."""
    setup, losses = SETUPS[config.setup], {}
    models, num_pairs = (work.hf, work.megatron), CHECKED_STEPS * setup.ranks * config.pairs_per_rank
    few = write_pairs(models, root, num_pairs, vocab_size=setup.model["vocab_size"])
    for index, name in enumerate(name for name in (OURS, *peers) if "grouped" not in name):
        try:
            losses[name] = train(
                name, config, few, root / f"run_{index}", pairs=config.pairs_per_rank, **setup.checked
            )["losses"]
        except (OutOfMemory, RuntimeError) as error:
            if name == OURS:
                raise
            print(f"    {name} in float32: {error}", flush=True)
    assert len(losses) > 1, "no peer runs in float32: nothing is compared"
    return check_losses(losses, setup.tolerance)


def compare(config: ThroughputConfig, root: Path) -> Iterator[list[Row]]:
    """Train in turns, and yield the rows after each round, the last of them counting all."""
    setup = SETUPS[config.setup]
    work = prepare(config, root)
    peers = _present(setup, config)
    if setup.checked:
        apart = check_in_float32(config, work, root / "checked", peers)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*setup.ours, *peers)}
    unable: list[Row] = []
    for repeat in range(config.repeats):
        for index, name in enumerate(list(runs)[:: -1 if repeat % 2 else 1]):
            try:
                done = train(name, config, work, root / f"run_{repeat}_{index}", pairs=config.pairs_per_rank)
            except (OutOfMemory, RuntimeError) as error:
                if name not in peers:
                    raise
                print(f"    {name} is left out: {error}", flush=True)
                unable.append(figure(setup.figure, f"runs: {_why(error)}", None, None, name, None, None, None))
                peers.remove(name)
                del runs[name]
            else:
                runs[name].append(done)
        if repeat == 0 and not setup.checked:
            apart = check_losses({name: done[0]["losses"] for name, done in runs.items()}, setup.tolerance)
        in_float32 = " in float32" if setup.checked else ""
        kind = "CPU second of the slower rank" if setup.device == "cpu" else "second"
        metric = (
            f"real tokens per {kind}, reference pass included, DP{setup.ranks}, {setup.precision}, {config.steps} "
            f"steps of {setup.ranks}x{config.pairs_per_rank} pairs, {sum(runs[OURS][0]['tokens'])} tokens, "
            f"{repeat + 1} turns; losses of the same batches{in_float32} differ by {apart:.1g}"
        )
        pace = {name: [_seconds_per_token(run, setup.warm_up) for run in done] for name, done in runs.items()}
        rows = [_row(setup, name, f"{ours}: {metric}", pace[name], pace[ours]) for ours in setup.ours for name in peers]
        if setup.device == "cuda":
            rows += [_memory_row(setup, name, runs) for name in peers]
        yield rows + unable


def _why(error: Exception) -> str:
    """Say in a line why a peer cannot run."""
    if isinstance(error, OutOfMemory):
        return "no, its batch does not fit into the GPU's memory"
    faults = re.findall(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*)", str(error), flags=re.MULTILINE)
    return f"no, {(faults or ['see the output'])[0][:200]}"


def fit(config: ThroughputConfig, root: Path) -> list[Row]:
    """Find the largest micro-batch that each trainer trains, in two steps of it -> rows."""
    setup = SETUPS[config.setup]
    assert setup.ranks == 1
    models = make_model(config, root)

    def tokens_of(name: str, pairs: int) -> int:
        """Train two steps -> real tokens of the larger one, 0 if memory runs out."""
        data = root / f"pairs_{pairs}"
        if not data.exists():
            write_pairs(models, data, 2 * pairs, vocab_size=setup.model["vocab_size"])
        work = Workload(hf=models[0], megatron=models[1], data=data / "data", pairs=data / "pairs.jsonl")
        output = root / f"fit_{list(TRAINERS).index(name)}_{pairs}"
        try:
            return max(train(name, config, work, output, pairs=pairs)["tokens"])
        except OutOfMemory:
            print(f"    {name}: {pairs} pairs do not fit", flush=True)
            return 0

    largest = {}
    for name in (OURS, *(peer for peer in _present(setup, config) if "grouped" not in peer)):
        pairs, most = config.pairs_per_rank, 0
        while pairs <= config.most_pairs and (tokens := tokens_of(name, pairs)):
            pairs, most = 2 * pairs, tokens
        assert most, f"{name}: not even {pairs} pairs fit. Start with fewer: --pairs-per-rank."
        largest[name] = (pairs <= config.most_pairs and tokens_of(name, 3 * pairs // 4)) or most
    metric = f"real tokens of the largest micro-batch that trains, {setup.precision}, no recomputation"
    return [
        figure(
            setup.figure,
            metric,
            largest[OURS],
            tokens,
            name,
            largest[OURS] / tokens,
            f">= {MORE_TOKENS}",
            largest[OURS] / tokens >= MORE_TOKENS,
        )
        for name, tokens in list(largest.items())[1:]
    ]


def curve(config: ThroughputConfig, root: Path) -> list[Row]:
    """Train on the same batches in two precisions, several epochs -> rows on the losses' difference."""
    setup = SETUPS[config.setup]
    name, flags = setup.other_precision
    work = prepare(config, root)
    wanted, found = (
        np.array(train(OURS, config, work, root / f"run_{index}", pairs=config.pairs_per_rank, lr=CURVE_LR,
                       epochs=CURVE_EPOCHS, more_flags=more)["losses"])
        for index, more in enumerate(("", flags))
    )  # fmt: skip
    print(f"    {setup.precision} {wanted.round(3).tolist()}\n    {name} {found.round(3).tolist()}")
    apart, last = float(np.abs(found / wanted - 1).max()), slice(-config.steps, None)
    before, wide, narrow = (float(losses.mean()) for losses in (wanted[: config.steps], wanted[last], found[last]))
    fall = 1 - wide / before
    metric = (
        f"loss of the last of {CURVE_EPOCHS} epochs of {config.steps} steps, lr {CURVE_LR:g}; it fell by {fall:.0%}; "
        "ratio: the greatest difference of one step's losses, relative"
    )
    target, met = f"<= {CURVE_BOUND}, and a fall of twice the ratio", apart <= CURVE_BOUND and fall >= 2 * apart
    return [figure("G2", f"{name}: {metric}", narrow, wide, setup.precision, apart, target, met)]


def _present(setup: Setup, config: ThroughputConfig) -> list[str]:
    """List the peers whose packages the peers' environment has."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('liger_kernel') is None)"
    has_liger = subprocess.run([str(config.peer_python), "-c", look], check=False).returncode == 0
    return [name for name in setup.peers if has_liger or "Liger" not in name]


def _seconds_per_token(run: dict[str, Any], warm_up: int) -> float:
    """Divide the timed steps' seconds, with their share of the reference pass, by their tokens."""
    tokens = sum(run["tokens"][warm_up:])
    return sum(run["steps"][warm_up:]) / tokens + run["reference"] / sum(run["tokens"])


def _row(setup: Setup, name: str, metric: str, theirs: list[float], ours: list[float]) -> Row:
    ratio, spread = ratio_of_medians(theirs, ours)
    target = setup.targets[TRAINERS[name][0]]
    speed, peer_speed = (1 / statistics.median(pace) for pace in (ours, theirs))
    return figure(setup.figure, metric, speed, peer_speed, name, ratio, f">= {target}", ratio >= target, spread)


def _memory_row(setup: Setup, name: str, runs: dict[str, list[dict[str, Any]]]) -> Row:
    ours, theirs = (max(run["peak"] for run in runs[trainer]) / 2**30 for trainer in (OURS, name))
    metric = "peak of allocated memory in the same runs, GiB"
    return figure(setup.figure, metric, ours, theirs, name, ours / theirs, None, None)


def _peers() -> Path:
    return Path(__file__).with_name("train_peers.py")


def main() -> None:
    """Measure and write benchmarks/results/<machine>/train_throughput*.json."""
    config = parse(ThroughputConfig, name=NAME, description=str(__doc__))
    machine, file = config.machine or describe_machine(), SETUPS[config.setup].file
    packages = ["torch", "megatron-core"]
    with tempfile.TemporaryDirectory() as root:
        if config.part != "speed":
            rows = {"fit": fit, "curve": curve}[config.part](config, Path(root))
            write_results(f"{file}_{config.part}", rows, machine=machine, packages=packages)
            return
        for rows in compare(config, Path(root)):  # written round by round: each takes minutes
            write_results(file, rows, machine=machine, packages=packages)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank_main(*sys.argv[2:5], json.loads(sys.argv[5]))
    else:
        run_tool(main, name=NAME)
