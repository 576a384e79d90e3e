"""Does replaying a mixture's routes help? The routes of the reference pass, recorded, and used again in every step.

    python -m benchmarks.router_replay

A random mixture (qwen3_moe, 4 layers, 16 experts, 4 of them a token) in bfloat16 on the CPU. First the noise before any
step: log pi of the same weights, computed as the reference pass computes it, in other micro-batches and on two
tensor-parallel ranks, with routes of its own and with those of the reference pass. Then training, both ways: how far
the loss falls, and what the trained weights give when the model chooses its routes itself, as every engine lets it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Row, describe_machine, write_results
from benchmarks.routes import NUM_EXPERTS, NUM_LAYERS, REFERENCE, TOP_K, one_pass, train
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.config_fields import PositiveInt
from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.models import MIXTURES, tiny_llama

NAME = "router_replay.py"
SECONDS = 1800.0
"""After which a pass or a training hangs."""
SHAPE = {"num_hidden_layers": NUM_LAYERS, "hidden_size": 128, "num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
ARRANGEMENTS = {
    "the same micro-batches": (1, REFERENCE),
    "micro-batches of one response": (1, "--micro-batch-size 1"),
    "two tensor-parallel ranks": (2, f"{REFERENCE} --tensor-model-parallel-size 2 --sequence-parallel"),
}


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How much is tried."""

    seeds: PositiveInt = 3
    """Models and data, each drawn anew."""
    steps: PositiveInt = 24
    """Of training; two are an epoch."""


def noise(megatron: str, data: str, work: Path) -> dict[tuple[str, str], float]:
    """Compare passes before any step with the reference pass -> {(arrangement, whose routes): rms in nats}."""
    routes = str(work / "routes.pt")
    (truth,) = run_ranks(one_pass, 1, megatron, data, REFERENCE, None, routes, timeout=SECONDS)
    found = {}
    for name, (num_ranks, flags) in ARRANGEMENTS.items():
        for whose, file in (("own", None), ("replayed", routes)):
            log_prob = run_ranks(one_pass, num_ranks, megatron, data, flags, file, None, timeout=SECONDS)[0]
            found[name, whose] = float(np.sqrt(np.mean((log_prob - truth) ** 2)))
    return found


def rows_of(noises: Sequence[dict[tuple[str, str], float]], trainings: dict[bool, list[dict[str, Any]]]) -> list[Row]:
    """Word what was found, means over seeds, routes of the model's own as the peer."""
    rows = []
    for name in ARRANGEMENTS:
        replayed, own = ([seed[name, whose] for seed in noises] for whose in ("replayed", "own"))
        rows.append(_row(f"log-ratio before the first step, {name}, rms in nats", replayed, own))
    for key, what in (
        ("first", "loss, mean of the first epoch"),
        ("given", "loss after training, routes of the reference pass"),
        ("own", "loss after training, routes of the model's own"),
        ("apart", "log pi after training, own routes against the reference pass's, rms in nats"),
        ("changed", "tokens of a layer whose own experts are no longer those of the reference pass, share"),
    ):
        rows.append(_row(what, *([run[key] for run in trainings[replays]] for replays in (True, False))))
    return rows


def _row(metric: str, replayed: Sequence[float], own: Sequence[float]) -> Row:
    ours, peer = float(np.mean(replayed)), float(np.mean(own))
    ratios = [one / other for one, other in zip(replayed, own, strict=True) if other]
    return Row(
        id="M1",
        metric=metric,
        ours=ours,
        peer=peer,
        peer_name="routes of its own",
        ratio=ours / peer if peer else None,
        target=None,
        met=None,
        spread=[min(ratios), max(ratios)] if ratios else None,
    )


def main() -> None:
    """Measure, and write the file."""
    config = parse(ReplayConfig, name=NAME, description=__doc__ or "")
    noises, trainings = list[dict[tuple[str, str], float]](), dict[bool, list[dict[str, Any]]]()
    for seed in range(config.seeds):
        with tempfile.TemporaryDirectory() as work:
            hf = tiny_llama(Path(work, "hf"), seed=seed, dtype="bfloat16", **{**MIXTURES["qwen3_moe"], **SHAPE})
            megatron = Path(work, "megatron")
            import_checkpoint(hf, megatron)
            places = str(megatron), str(write_dataset(Path(work, "data"), hf))
            noises.append(noise(*places, Path(work)))
            for replays in (True, False):
                trainings.setdefault(replays, []).extend(
                    run_ranks(train, 1, *places, config.steps, replays, timeout=SECONDS)
                )
    rows = rows_of(noises, trainings)
    write_results("router_replay", rows, machine=describe_machine(), packages=("torch", "megatron-core"))


if __name__ == "__main__":
    run_tool(main, name=NAME)
