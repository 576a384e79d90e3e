"""Figure G2: a training step of SPPO beside a plain supervised step of the same Megatron model, bfloat16 and FP8.

    python -m benchmarks.train_gpu --shape 1b            and 3b, 8b (of which 8 layers, so that one GPU holds it)
    python -m benchmarks.train_gpu --shape tiny          a dry run on any machine

Both steps run the same packed micro-batches of 16 documents of 512 tokens (160 of them the prompt's) through the same
schedule, the same DDP buffers and the same optimizer. The supervised step is Megatron-Core's own: all positions through
the vocabulary and its cross-entropy. MFU is model FLOPs over the ceiling, one 8192^3 bfloat16 product timed here.
"""

import dataclasses
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from benchmarks.record import Row, alternate_seconds, describe_machine, figure, ratio_of_medians, write_results
from megatron_sppo import flops
from megatron_sppo.architecture import Architecture
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.writer import DatasetWriter
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.transformer_engine import check_machine
from megatron_sppo.planning.architectures import PUBLISHED
from megatron_sppo.training import parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import BatchConfig, OptimizationConfig, ParallelConfig, TrainingConfig
from megatron_sppo.training.forward_step import gradient_step
from megatron_sppo.training.optimizer import build_optimizer
from megatron_sppo.training.policy import Policy, build_policy
from megatron_sppo.training.step_plan import StepPlan

NAME = "train_gpu.py"
PROMPT, DOCUMENT, DOCUMENTS = 160, 512, 16
SHAPES: dict[str, Architecture] = {
    "tiny": dataclasses.replace(
        PUBLISHED["smollm2-135m"], num_layers=2, hidden_size=128, ffn_hidden_size=256, vocab_size=512,
        num_attention_heads=4, num_query_groups=2, kv_channels=32,
    ),
    "32m": dataclasses.replace(
        PUBLISHED["smollm2-135m"], num_layers=8, hidden_size=384, ffn_hidden_size=1024, vocab_size=32768,
        num_attention_heads=6, num_query_groups=2, kv_channels=64,
    ),
    "1b": PUBLISHED["llama3.2-1b"],
    "3b": PUBLISHED["llama3.2-3b"],
    "8b": dataclasses.replace(PUBLISHED["llama3-8b"], num_layers=8),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainGpuConfig:
    """What is compared."""

    shape: Literal["tiny", "32m", "1b", "3b", "8b"] = "1b"
    micro_batches: int = 4
    """Micro-batches of 8192 tokens in a step (512 tokens in the dry run, 1024 of the 32M shape, which is C10's)."""
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed"] = "tensorwise"
    repeats: int = 5
    """Measured turns of each kind of step, after two that are not."""
    machine: str | None = None
    """Folder under benchmarks/results; unset: named after the GPU."""

    @property
    def documents(self) -> int:
        """Documents of a micro-batch."""
        return {"tiny": 1, "32m": 2}.get(self.shape, DOCUMENTS)


def write_documents(directory: Path, architecture: Architecture, num_documents: int) -> Path:
    """Write documents of one length with random tokens and win rates, four answers a prompt -> the dataset."""
    generator = np.random.default_rng(0)
    with DatasetWriter(
        directory,
        num_responses=4,
        tokenizer_hash=None,
        vocab_size=architecture.vocab_size,
        judge="rules:concise",
        preset="paper",
        selection="all",
        rollouts_sha256=None,
    ) as writer:
        for _ in range(-(-num_documents // 4)):
            logits = generator.normal(size=(4, 4)).astype(np.float32)
            np.fill_diagonal(logits, 0)
            tokens = generator.integers(0, architecture.vocab_size, (5, DOCUMENT))
            writer.append(tokens[0, :PROMPT].tolist(), tokens[1:, PROMPT:].tolist(), logits)
    return directory


class Bench:
    """One model in one precision, with both kinds of step."""

    def __init__(self, config: TrainGpuConfig, model: ModelConfig, data: Path) -> None:
        architecture, layout = SHAPES[config.shape], ParallelConfig()
        documents = config.micro_batches * config.documents
        self.training = TrainingConfig(
            load=data,
            data=data,
            save=data,
            model=model,
            optimization=OptimizationConfig(lr=1e-7),
            batch=BatchConfig(micro_batch_size=config.documents, global_batch_size=documents, seq_length=DOCUMENT),
        )
        dataset = PreferenceDataset(data)
        reference = np.zeros((dataset.num_groups, dataset.num_responses), np.float32)
        self.policy: Policy = build_policy(architecture, model, layout)
        batches = Batches(dataset, self.training, max_length=DOCUMENT)
        self.plan: StepPlan = next(batches.steps(first=1, last=1, reference_GK=reference))
        self.optimizer = build_optimizer(self.policy.chunks, self.training.optimization, model, layout)

    def sppo(self) -> None:
        """Do one step of SPPO."""
        gradient_step(self.policy, self.optimizer, self.plan, objective=self.training.objective)
        self.optimizer.step()

    def supervised(self) -> None:
        """Do one supervised step on the responses, by Megatron-Core's own head and loss."""
        stage = self.policy.stages[0]
        stage._postprocess = types.MethodType(GPTModel._postprocess, stage)
        try:
            for chunk in self.policy.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            self._supervised_micro_batches()
            self.optimizer.step()
        finally:
            del stage._postprocess

    def _supervised_micro_batches(self) -> None:
        batches, tokens = self.plan.micro_batches, self.plan.micro_batches[0].tokens
        get_forward_backward_func()(
            forward_step_func=_supervised_forward,
            data_iterator=iter(batches),
            model=self.policy.chunks[0],
            num_microbatches=len(batches),
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )

    def model_flops(self) -> float:
        """Count a step of SPPO, forward and backward."""
        return flops.training_flops(
            self.policy.architecture,
            num_tokens=self.plan.num_tokens,
            attended_positions=self.plan.attended_positions,
            num_response_tokens=int(self.plan.num_response_tokens.sum()),
        )


def _supervised_forward(batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    from megatron_sppo.model import gpt

    batch = next(batches).to(parallel.device())
    labels, counted = torch.zeros_like(batch.tokens), torch.zeros_like(batch.tokens, dtype=torch.bool)
    labels[0, batch.response_rows] = batch.labels_R  # packed: one row
    counted[0, batch.response_rows] = True
    output = gpt.forward(
        model,
        batch.tokens,
        batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        response=labels,  # type: ignore[arg-type]
    )

    def loss_sum(token_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return (token_loss * counted).sum(), counted.sum().int(), {}

    return output, loss_sum


def matmul_ceiling(size: int) -> float:
    """Time one product of square bfloat16 matrices of random numbers, the best of ten -> TFLOP/s."""
    a, b = (torch.randn(size, size, device=parallel.device()).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(a, b)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e12


def measure(config: TrainGpuConfig, model: ModelConfig, data: Path) -> tuple[dict[str, list[float]], Bench]:
    """Take turns of both kinds of step -> wall seconds by kind, the bench."""
    check_machine(model)
    bench = Bench(config, model, data)
    for step in (bench.sppo, bench.supervised) * 2:
        step()
    return alternate_seconds({"sppo": bench.sppo, "supervised": bench.supervised}, repeats=config.repeats), bench


def compare(config: TrainGpuConfig, data: Path) -> list[Row]:
    """Measure bfloat16 and, on a GPU, FP8 -> rows."""
    on_gpu = torch.cuda.is_available()
    ceiling = matmul_ceiling(8192 if on_gpu else 512)
    models = {"bf16": ModelConfig()}
    if on_gpu:
        models[f"FP8 {config.fp8_recipe}"] = ModelConfig(fp8="hybrid", fp8_recipe=config.fp8_recipe)
    rows, rates = [], {}
    for precision, model in models.items():
        seconds, bench = measure(config, model, data)
        tokens, work = bench.plan.num_tokens, bench.model_flops()
        ratio, spread = ratio_of_medians(seconds["supervised"], seconds["sppo"])
        ours, theirs = (tokens / statistics.median(seconds[kind]) for kind in ("sppo", "supervised"))
        rates[precision] = ours
        size = f"{config.shape} shape, {precision}, packed {config.documents * DOCUMENT}"
        rows.append(_row(f"tokens/s, {size}", ours, theirs, "supervised step", ratio, ">= 0.95", ratio >= 0.95, spread))
        achieved = work / statistics.median(seconds["sppo"]) / 1e12
        share = achieved / ceiling
        target, met = (">= 0.5", share >= 0.5) if precision == "bf16" else (None, None)
        rows.append(_row(f"model TFLOP/s, {size}", achieved, ceiling, "one bf16 product", share, target, met))
        rows.append(_row(f"model TFLOP/s, {size}", achieved, 989.0, "on paper", achieved / 989, None, None))
        del bench
        if on_gpu:
            torch.cuda.empty_cache()
    if len(rates) == 2:
        wide, narrow = rates.values()
        rows.append(
            _row(
                f"tokens/s, {config.shape} shape, FP8 {config.fp8_recipe} against bf16",
                narrow,
                wide,
                "ours in bf16",
                narrow / wide,
                ">= 1.25",
                narrow / wide >= 1.25,
            )
        )
    return rows


_row = partial(figure, "G2")


def main() -> None:
    """Measure and write benchmarks/results/<machine>/train_gpu_<shape>.json (another recipe's: _<recipe>.json)."""
    config = parse(TrainGpuConfig, name=NAME, description=str(__doc__))
    parallel.initialize(ParallelConfig(), seed=1)
    with tempfile.TemporaryDirectory() as directory:
        documents = config.micro_batches * config.documents
        data = write_documents(Path(directory, "data"), SHAPES[config.shape], documents)
        rows = compare(config, data)
    parallel.shut_down()
    recipe = "" if config.fp8_recipe == TrainGpuConfig.fp8_recipe else f"_{config.fp8_recipe}"
    write_results(
        f"train_gpu_{config.shape}{recipe}",
        rows,
        machine=config.machine or describe_machine(),
        packages=["torch", "megatron-core"],
    )


if __name__ == "__main__":
    run_tool(main, name=NAME)
