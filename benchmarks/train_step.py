"""Figure C10: a training step of SPPO beside a plain supervised step of the same Megatron model, on the CPU, float32.

    OMP_NUM_THREADS=1 python -m benchmarks.train_step

Both are those of `benchmarks.train_gpu` (the same packs, gradient buffers and optimizer; the supervised one by
Megatron-Core's own head and loss), of a Llama of 26 million parameters whose embedding and head are half of it, in CPU
seconds. Rows of prompts never reach our head; that is where the time is saved.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import Row, alternate, describe_machine, ratio_of_medians, write_results
from benchmarks.train_gpu import DOCUMENT, PROMPT, SHAPES, Bench, TrainGpuConfig, write_documents
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.training import parallel
from megatron_sppo.training.config import ParallelConfig

NAME = "train_step.py"


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig:
    """How often."""

    micro_batches: int = 2
    """Of 1,024 tokens, in a step."""
    repeats: int = 7
    """Turns of both kinds of step, after one that does not count."""
    machine: str | None = None
    """Folder of the results; unset: named after the processor."""


def main() -> None:
    """Measure and write benchmarks/results/<machine>/train_step.json."""
    config = parse(TrainStepConfig, name=NAME, description=str(__doc__))
    shape = TrainGpuConfig(shape="32m", micro_batches=config.micro_batches)
    parallel.initialize(ParallelConfig(), seed=1)
    with tempfile.TemporaryDirectory() as directory:
        data = write_documents(Path(directory, "data"), SHAPES["32m"], shape.micro_batches * shape.documents)
        bench = Bench(shape, ModelConfig(params_dtype="float32", transformer_impl="torch"), data)
        for step in (bench.sppo, bench.supervised):
            step()
        seconds = alternate({"sppo": bench.sppo, "supervised": bench.supervised}, repeats=config.repeats)
    parallel.shut_down()
    ratio, spread = ratio_of_medians(seconds["supervised"], seconds["sppo"])
    ours, theirs = (bench.plan.num_tokens / statistics.median(seconds[kind]) for kind in ("sppo", "supervised"))
    size = f"packs of {shape.documents} x {DOCUMENT} tokens, {PROMPT} of them the prompt's"
    row = Row(
        id="C10",
        metric=f"tokens a CPU second in a training step, Llama of 26M, float32, {size}",
        ours=ours,
        peer=theirs,
        peer_name="supervised step of the same model",
        ratio=ratio,
        target=">= 1",
        met=ratio >= 1,
        spread=spread,
    )
    machine = config.machine or describe_machine()
    write_results("train_step", [row], machine=machine, packages=["torch", "megatron-core"])


if __name__ == "__main__":
    run_tool(main, name=NAME)
