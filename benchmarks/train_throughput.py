"""Figure C3: tokens trained per second, two data-parallel CPU ranks: ours, TRL's DPOTrainer, the official SPPO maths.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0       # the peers' own environment
    OMP_NUM_THREADS=1 python -m benchmarks.train_throughput --peer-python trl/bin/python

A random Llama of 22 million parameters, pairs of random tokens with chat-like lengths (benchmarks/head.py), float32,
AdamW, loss sppo_hard. Same weights and global batches for all: their losses are first checked equal. Then the trainers
take turns. Seconds are CPU seconds of the slower rank of each step, and of the reference pass, whose cost ours and TRL
pay once; the official code runs its reference model in every step. Real tokens are prompts' and responses'.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.head import draw_lengths
from benchmarks.record import Row, describe_cpu, ratio_of_medians, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.data.planning import epoch_order
from megatron_sppo.data.writer import DatasetWriter

NAME = "train_throughput.py"
RANKS = 2
SEED = 1234
END = 2
"""Id of the end-of-sequence token."""
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
TRAINERS = {
    "ours": "",
    "TRL DPOTrainer sppo_hard": "trl",
    "TRL DPOTrainer sppo_hard, grouped by length": "trl",
    "official SPPO's maths": "official",
}
TARGETS = {"trl": 1.8, "official": 2.2}


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Size of the comparison."""

    peer_python: Path
    """Python of the peers' environment."""
    steps: int = 10
    pairs_per_rank: int = 4
    """Pairs in a step, for each of the two ranks; the peers' per-device batch."""
    repeats: int = 5
    """Measured turns of each trainer."""
    eta: float = 10.0
    lr: float = 1e-4
    machine: str | None = None
    """Folder under benchmarks/results; None names the processor."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every trainer is given."""

    hf: Path
    megatron: Path
    data: Path
    pairs: Path
    num_tokens: int


def prepare(config: ThroughputConfig, root: Path) -> Workload:
    """Write the model in both forms, and the pairs: a dataset of ours, and JSON lines in the order ours visits them."""
    subprocess.run([str(config.peer_python), str(_peers()), "model", str(root / "hf"), json.dumps(MODEL)], check=True)
    import_checkpoint(root / "hf", root / "megatron")
    num_pairs = config.steps * RANKS * config.pairs_per_rank
    prompts, responses = draw_lengths(num_pairs, np.random.default_rng(11))
    generator = np.random.default_rng(12)

    def draw(length: int) -> list[int]:
        return generator.integers(3, MODEL["vocab_size"], length).tolist()

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
        vocab_size=MODEL["vocab_size"],
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
    num_tokens = int((prompts + responses).sum())
    return Workload(hf=root / "hf", megatron=root / "megatron", data=root / "data", pairs=root / "pairs.jsonl",
                    num_tokens=num_tokens)  # fmt: skip


def train(name: str, config: ThroughputConfig, work: Workload, output: Path) -> dict[str, Any]:
    """Train once -> losses, critical-path CPU seconds: of the reference pass, and of each step."""
    settings = {
        "eta": config.eta,
        "lr": config.lr,
        "pairs_per_rank": config.pairs_per_rank,
        "group_by_length": "grouped" in name,
    }
    if TRAINERS[name]:
        python, script = str(config.peer_python), str(_peers())
        arguments = [TRAINERS[name], str(work.hf), str(work.pairs), str(output), json.dumps(settings)]
    else:
        python, script = sys.executable, str(Path(__file__))
        arguments = ["rank", str(work.megatron), str(work.data), str(output), json.dumps(settings)]
    launcher = [python, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--master-port=29571"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(f"{output}.log", "wb") as log:
        done = subprocess.run([*launcher, script, *arguments], env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{Path(f'{output}.log').read_text(errors='replace')[-4000:]}")
    ranks = [json.loads((output / f"rank_{rank}.json").read_text()) for rank in range(RANKS)]
    slowest = [max(times) for times in zip(*(rank["steps"] for rank in ranks), strict=True)]
    reference = max(rank["reference"] for rank in ranks)
    print(f"    {name}: reference {reference:.1f}, steps {sum(slowest):.1f} CPU seconds of the slower rank", flush=True)
    return {"losses": ranks[0]["losses"], "reference": reference, "steps": slowest}


def rank_main(megatron: str, data: str, output: str, settings: dict[str, Any]) -> None:
    """Train as examples/pretrain_sppo.py does, with a clock between the steps (a rank that torchrun started)."""
    from megatron_sppo.training import checkpoint, inputs, loop, parallel, reference
    from megatron_sppo.training.config import TrainingConfig
    from megatron_sppo.training.optimizer import build_optimizer, build_scheduler
    from megatron_sppo.training.policy import build_policy

    share = 2 * settings["pairs_per_rank"]
    argv = (
        f"--load {megatron} --data {data} --save {output}/run --objective sppo_hard --eta {settings['eta']} "
        f"--micro-batch-size {share} --global-batch-size {RANKS * share} --seed {SEED} --lr {settings['lr']} "
        "--lr-decay-style constant --clip-grad 0 --params-dtype float32 --no-tensorboard"
    )
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
    progress = loop.Progress(facts=loop.run_facts(batches, config))
    progress.reference = reference.fingerprint(policy, dataset, config, selection=batches.selection)
    begin = time.process_time()
    reference_GK = reference.load_or_compute(policy, dataset, batches, progress.reference, config=config)
    result: dict[str, Any] = {"reference": time.process_time() - begin, "steps": []}

    def clocked() -> Iterator[Any]:
        begin = time.process_time()
        for plan in batches.steps(first=1, last=batches.train_iters, reference_GK=reference_GK):
            yield plan
            result["steps"].append(time.process_time() - begin)
            begin = time.process_time()

    loop.train(
        policy,
        optimizer,
        scheduler,
        clocked(),
        config=config,
        train_iters=batches.train_iters,
        progress=progress,
        save=lambda: None,
    )
    rank = parallel.launcher_rank()
    if rank == 0:
        lines = Path(output, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        result["losses"] = [json.loads(line)["loss"] for line in lines]
    Path(output, f"rank_{rank}.json").write_text(json.dumps(result), encoding="ascii")
    parallel.shut_down()


def check_losses(losses: dict[str, list[float]]) -> float:
    """Refuse to compare speeds of trainers whose loss curves differ by more than 1e-3 -> the greatest difference."""
    worst = 0.0
    for name, curve in losses.items():
        apart = np.abs(np.array(curve) / np.array(losses["ours"]) - 1).max()
        print(f"    {name}: losses {curve[0]:.4f} .. {curve[-1]:.4f}, differ by {apart:.2g}", flush=True)
        worst = max(worst, float(apart))
    assert worst <= 1e-3, f"losses differ by {worst:.2g}"
    return worst


def compare(config: ThroughputConfig, root: Path) -> Iterator[list[Row]]:
    """Train in turns, and yield the rows after each round, the last of them counting all."""
    work = prepare(config, root)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINERS}
    for repeat in range(config.repeats):
        for index, name in enumerate(list(TRAINERS)[:: -1 if repeat % 2 else 1]):
            runs[name].append(train(name, config, work, root / f"run_{repeat}_{index}"))
        if repeat == 0:
            apart = check_losses({name: done[0]["losses"] for name, done in runs.items() if "grouped" not in name})
        seconds = {name: [run["reference"] + sum(run["steps"]) for run in done] for name, done in runs.items()}
        metric = (
            f"real tokens per CPU second of the slower rank, reference pass included, DP{RANKS}, float32, "
            f"{config.steps} steps of {RANKS}x{config.pairs_per_rank} pairs, {work.num_tokens} tokens, "
            f"{repeat + 1} turns; losses of the same batches differ by {apart:.1g}"
        )
        yield [_row(name, metric, seconds, work.num_tokens) for name in list(TRAINERS)[1:]]


def _row(name: str, metric: str, seconds: dict[str, list[float]], num_tokens: int) -> Row:
    ratio, spread = ratio_of_medians(seconds[name], seconds["ours"])
    target = TARGETS[TRAINERS[name]]
    return Row(
        id="C3",
        metric=metric,
        ours=num_tokens / statistics.median(seconds["ours"]),
        peer=num_tokens / statistics.median(seconds[name]),
        peer_name=name,
        ratio=ratio,
        target=f"ours / peer >= {target}",
        met=ratio >= target,
        spread=spread,
    )


def _peers() -> Path:
    return Path(__file__).with_name("train_peers.py")


def main() -> None:
    """Measure and write benchmarks/results/<machine>/train_throughput.json."""
    config = parse(ThroughputConfig, name=NAME, description=str(__doc__))
    machine = config.machine or describe_cpu()
    with tempfile.TemporaryDirectory() as root:
        for rows in compare(config, Path(root)):  # written round by round: each takes minutes
            write_results("train_throughput", rows, machine=machine, packages=["torch", "megatron-core"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank_main(*sys.argv[2:5], json.loads(sys.argv[5]))
    else:
        run_tool(main, name=NAME)
