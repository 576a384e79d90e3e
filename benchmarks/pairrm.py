"""Figures C6 (CPU) and G4 (GPU): PairRM over K responses, both orders, beside llm-blender's own `rank`.

    OMP_NUM_THREADS=1 python -m benchmarks.pairrm --peer-python PEER/bin/python                        C6
    python -m benchmarks.pairrm --peer-python PEER/bin/python \
        --device cuda --shape 0.4b --prompts 64 --responses 5 --batches 8 16 32 64                             G4

llm_blender_peer.py says how to make PEER. Both judge the same texts with the same random weights; the scores are
compared before anything is timed. The peer runs at batch 1, as the official scripts do, and at the best of --batches.
CPU seconds of each process on the CPU (one thread each), wall time on a GPU.
"""

import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from benchmarks.record import Row, describe_cpu, describe_machine, ratio_of_medians, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.judge.pairrm.judge import PairRMJudge
from megatron_sppo.rollout.records import RolloutGroup
from tests.unit.judge.groups import group_of, random_text
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm

NAME = "pairrm.py"
SHAPES = {
    "small": {"hidden_size": 384, "num_layers": 6, "num_heads": 6, "ffn_multiple": 4},
    # deberta-v3-large, which PairRM is; but for its 128,000 rows of word embeddings, which are only looked up.
    "0.4b": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "ffn_multiple": 4},
}
TOLERANCE = {"cpu": 5e-5, "cuda": 5e-2}
"""Largest difference of two scores, nats: rounding of float32 over 6 or 24 layers; of bf16 and fp16 on a GPU."""
TOKENS_PER_WORD = 1.83
"""Of the random words that texts are made of, under the random PairRM's tokenizer."""


@dataclass(frozen=True, kw_only=True)
class PairRMConfig:
    """Sizes of the comparison."""

    peer_python: Path
    """Python of an environment that has llm-blender==0.0.2."""
    shape: Literal["small", "0.4b"] = "small"
    """6 layers of 384, or deberta-v3-large's 24 of 1024."""
    prompts: int = 6
    responses: int = 2
    """K: a prompt has K (K - 1) ordered pairs."""
    batches: tuple[int, ...] = (2, 4, 6)
    """Batch sizes of which the peer's best is taken, each tried once."""
    device: Literal["cpu", "cuda"] = "cpu"
    """On a GPU ours is bfloat16 and llm-blender's float16: each at its default."""
    repeats: int = 5
    machine: str | None = None
    """Folder under benchmarks/results; unset: named after the processor or GPU that it ran on."""


class Peer:
    """llm-blender in a process of its own; see llm_blender_peer.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.versions: dict[str, str] = self._answer()["versions"]

    def rank(self, batch_size: int) -> tuple[float, np.ndarray]:
        """Rank all prompts once -> (seconds, scores [G, K])."""
        self._pipe(self._process.stdin).write(f"{batch_size}\n")
        self._pipe(self._process.stdin).flush()
        answer = self._answer()
        return answer["seconds"], np.array(answer["scores"])

    def _answer(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise DataError("llm-blender's process ended early: see above. Make its environment anew.")
        return json.loads(line)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@contextmanager
def running_peer(config: PairRMConfig, checkpoint: Path, cases: Path) -> Iterator[Peer]:
    """Start the peer, and end it with the block -> Peer, loaded."""
    script = Path(__file__).with_name("llm_blender_peer.py")
    command = [config.peer_python, script, checkpoint, cases, config.device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Peer(process)
        finally:
            process.kill()


def draw_groups(num_prompts: int, num_responses: int) -> list[RolloutGroup]:
    """Draw texts as long as real ones -> groups: log-normal, prompts of a median of 120 tokens (at most 512), responses
    of 250 (at most 700). That is below llm-blender's limits: nothing is cut.
    """
    generator, rng = np.random.default_rng(0), random.Random(0)

    def text(median: float, sigma: float, most: int) -> str:
        words = int(np.clip(generator.lognormal(np.log(median), sigma), 8, most) / TOKENS_PER_WORD)
        return random_text(rng, words, words)

    return [
        group_of(text(120, 0.9, 512), [text(250, 0.6, 700) for _ in range(num_responses)], prompt_id=str(number))
        for number in range(num_prompts)
    ]


def judge_once(judge: PairRMJudge, groups: list[RolloutGroup], *, device: str) -> tuple[float, np.ndarray]:
    """Judge all prompts once -> (seconds, scores [G, K] as llm-blender's `rank` has them)."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    begin = clock()
    logits_GKK = np.stack(judge.judge_logits(groups))
    seconds = clock() - begin
    return seconds, (logits_GKK - logits_GKK.transpose(0, 2, 1)).mean(axis=-1)


def compare(config: PairRMConfig, root: Path) -> list[Row]:
    """Check that scores are equal, time both in turns -> rows."""
    torch.set_num_threads(1 if config.device == "cpu" else torch.get_num_threads())
    checkpoint, _ = make_tiny_pairrm(root, **SHAPES[config.shape])
    groups = draw_groups(config.prompts, config.responses)
    cases = [{"source": g.messages[0]["content"], "candidates": [r.text for r in g.responses]} for g in groups]
    (root / "cases.json").write_text(json.dumps(cases))
    judge = PairRMJudge(str(checkpoint), reads="message", device=config.device)
    with running_peer(config, checkpoint, root / "cases.json") as peer:
        _, ours = judge_once(judge, groups, device=config.device)
        first = {batch: peer.rank(batch) for batch in (1, *config.batches)}
        for batch, (seconds, scores) in first.items():
            difference = float(np.abs(scores - ours).max())
            print(
                f"    llm-blender, batch {batch}: {seconds:.2f} s; scores spread by {ours.std():.2f}, differ by "
                f"{difference:.1e}",
                flush=True,
            )
            if difference > TOLERANCE[config.device]:
                raise DataError(f"scores differ by {difference:.1e} nats. Nothing was timed.")
        best = min(config.batches, key=lambda batch: first[batch][0])
        batches = tuple(dict.fromkeys((1, best)))
        times: dict[object, list[float]] = {"ours": [], **{batch: [] for batch in batches}}
        for repeat in range(config.repeats):
            for name in list(times)[:: -1 if repeat % 2 else 1]:
                seconds = (
                    judge_once(judge, groups, device=config.device)[0]
                    if name == "ours"
                    else peer.rank(int(str(name)))[0]
                )
                times[name].append(seconds)
                print(f"    {name}: {seconds:.2f} s", flush=True)
        return [_row(config, times, batch, peer.versions) for batch in batches]


def _row(config: PairRMConfig, times: dict[object, list[float]], batch: int, versions: dict[str, str]) -> Row:
    ratio, spread = ratio_of_medians(times[batch], times["ours"])
    on_cpu, is_official = config.device == "cpu", batch == 1
    target = 1.3 if on_cpu else 8.0 if is_official else 2.0
    pairs = config.prompts * config.responses * (config.responses - 1)
    described = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "llm-blender")
    return Row(
        id="C6" if on_cpu else "G4",
        metric=f"{config.shape} shape, {pairs} ordered pairs (K={config.responses}), {'CPU ' if on_cpu else ''}seconds",
        ours=statistics.median(times["ours"]),
        peer=statistics.median(times[batch]),
        peer_name=f"llm-blender {versions['llm-blender']} rank, batch {batch}{'' if is_official else ' (its best)'} "
        f"({described})",
        ratio=ratio,
        target=f">= {target:g}x",
        met=ratio >= target,
        spread=spread,
    )


def main() -> None:
    """Parse the command line, compare, record."""
    config = parse(PairRMConfig, name=NAME, description=__doc__ or "")
    if not config.peer_python.exists():
        raise ConfigError(f"{config.peer_python} does not exist. benchmarks/llm_blender_peer.py says how to make it.")
    with tempfile.TemporaryDirectory() as root:
        rows = compare(config, Path(root))
    name = "pairrm" if config.shape == "small" else f"pairrm_{config.shape}"
    machine = config.machine or (describe_machine() if config.device == "cuda" else describe_cpu())
    write_results(name, rows, machine=machine, packages=("torch", "transformers", "numpy"))


if __name__ == "__main__":
    run_tool(main, name=NAME)
