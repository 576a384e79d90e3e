"""The plan's memory against what four real ranks hold, in the layout of examples/configs/llama3_70b_h100.yaml.

The model is Llama-3-70B divided by 64 in width and by 10 in depth, TP8 x PP4 becomes TP2 x PP2, and FP8 is left out:
the rest of the file is taken as it is. Every sequence is as long as the config lets it be, so that the plan's largest
micro-batch is the one that runs. Counted are all tensors of a rank, from before the model is built to the second step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.data.writer import DatasetWriter
from megatron_sppo.planning.config import read_plan
from megatron_sppo.planning.memory import StageMemory, stage_memory
from megatron_sppo.planning.parameters import Grid
from megatron_sppo.planning.plan import largest_micro_batch
from tests.distributed.conftest import all_layouts
from tests.distributed.harness import run_ranks
from tests.distributed.worlds import pretrain
from tests.models import BYTE_VOCAB_SIZE, tiny_llama

CONFIG = Path(__file__).resolve().parents[2] / "examples/configs/llama3_70b_h100.yaml"
LENGTH = 128
PACKED = 2 * LENGTH  # tokens of a micro-batch: two of the longest responses, as in the file
SMALLER = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--fp8", "none"]
SMALLER += ["--transformer-impl", "torch", "--seq-length", str(LENGTH), "--global-batch-size", "8"]
SMALLER += ["--packed-sequence-size", str(PACKED)]
LAYOUTS = {
    "as the file says": [],
    "nothing recomputed, interleaved": [
        *("--recompute-granularity", "none", "--virtual-pipeline-model-parallel-size", "2"),
    ],
    "adapters, TP2 DP2, float32": [
        *("--pipeline-model-parallel-size", "1", "--params-dtype", "float32", "--lora-rank", "16"),
        *("--recompute-granularity", "full"),
    ],
    "CP2 PP2": ["--tensor-model-parallel-size", "1", "--no-sequence-parallel", "--context-parallel-size", "2"],
}
MORE_LAYOUTS = {
    "full recomputation": ["--recompute-granularity", "full"],
    "TP2 DP2, float32": ["--pipeline-model-parallel-size", "1", "--params-dtype", "float32"],
    "adapters": ["--lora-rank", "16"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and key/value heads, feed-forward and hidden channels stand in the proportions of Llama-3-70B."""
    return tiny_llama(
        tmp_path_factory.mktemp("model") / "hf",
        num_hidden_layers=8,
        hidden_size=128,
        intermediate_size=448,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=8,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of the greatest length to prompts of two tokens."""
    directory = tmp_path_factory.mktemp("data") / "data"
    generator = np.random.default_rng(0)
    with DatasetWriter(
        directory,
        num_responses=4,
        tokenizer_hash=tokenizer_hash(model),
        vocab_size=BYTE_VOCAB_SIZE,
        judge="rules:concise",
        preset="paper",
        selection="all",
        rollouts_sha256=None,
    ) as writer:
        for _ in range(8):
            logits = generator.normal(size=(4, 4)).astype(np.float32)
            np.fill_diagonal(logits, 0)
            answers = generator.integers(0, BYTE_VOCAB_SIZE, (4, LENGTH - 2)).tolist()
            writer.append([5, 6], answers, logits)
    return directory


def two_steps(architecture: Architecture, data: str, argv: list[str]) -> tuple[int, int]:
    """Train two steps and count this rank's tensors -> (bytes between steps, most bytes in the second)."""
    from megatron_sppo import config as configuration
    from megatron_sppo.data.dataset import PreferenceDataset
    from megatron_sppo.training import parallel
    from megatron_sppo.training.batches import Batches
    from megatron_sppo.training.config import TrainingConfig
    from megatron_sppo.training.forward_step import gradient_step
    from megatron_sppo.training.optimizer import build_optimizer
    from megatron_sppo.training.policy import build_policy
    from tests.memory import LiveBytes

    arguments = ["--config", str(CONFIG), "--load", "-", "--data", data, "--save", "-", *argv]
    config = configuration.parse(TrainingConfig, name="test", description="", argv=arguments)
    dataset = PreferenceDataset(Path(data))
    batches = Batches(dataset, config, max_length=LENGTH)
    reference = np.zeros((dataset.num_groups, dataset.num_responses), np.float32)
    parallel.initialize(config.parallel, seed=1)
    with LiveBytes() as live:
        adapters = config.adapters.settings(architecture)
        policy = build_policy(architecture, config.model, config.parallel, adapters=adapters)
        optimizer = build_optimizer(policy.chunks, config.optimization, config.model, config.parallel)
        for plan in batches.steps(first=1, last=2, reference_GK=reference):
            optimizer.zero_grad()
            between, live.peak = live.current, live.current
            gradient_step(policy, optimizer, plan, objective=config.objective)
            optimizer.step()
    parallel.shut_down()
    return between, live.peak


def planned(model: Path, argv: list[str]) -> tuple[Grid, list[StageMemory]]:
    config, _ = read_plan(["--config", str(CONFIG), *argv], name="test", description="")
    architecture = architecture_of(model)
    grid = Grid(parallel=config.parallel, world_size=4, adapters=config.adapters.settings(architecture))
    shape = largest_micro_batch(config, grid, architecture)
    num = config.batch.global_batch_size * LENGTH // (PACKED * grid.data_parallel_size)
    optimizer = config.optimization.optimizer
    settings = {"num_micro_batches": num, "optimizer": optimizer, "engine": False, "machine": None}
    stages = range(config.parallel.pipeline_model_parallel_size)
    return grid, [stage_memory(architecture, config.model, grid, shape, stage=stage, **settings) for stage in stages]


def architecture_of(model: Path) -> Architecture:
    return architecture_from_hf(json.loads((model / "config.json").read_text()))


@pytest.mark.parametrize("layout", [*LAYOUTS, *all_layouts(*((name,) for name in MORE_LAYOUTS))])
def test_every_rank_s_memory_is_within_a_tenth_of_the_plan_s(layout: str, model: Path, data: Path) -> None:
    argv = [*SMALLER, *(LAYOUTS | MORE_LAYOUTS)[layout]]
    grid, stages = planned(model, argv)
    results: list[Any] = run_ranks(two_steps, 4, architecture_of(model), str(data), argv)
    for rank, (between, peak) in enumerate(results):
        plan = stages[rank * len(stages) // grid.world_size]  # pipeline stages are the slowest axis
        assert plan.resident == pytest.approx(between, rel=0.1)
        assert plan.total == pytest.approx(peak, rel=0.1)
        assert plan.activations + plan.working == pytest.approx(peak - between, rel=0.1)


def test_the_file_itself_trains_on_four_ranks(model: Path, data: Path, tmp_path: Path) -> None:
    from megatron_sppo.conversion.convert import import_checkpoint

    import_checkpoint(model, tmp_path / "megatron")
    paths = ["--load", str(tmp_path / "megatron"), "--data", str(data), "--save", str(tmp_path / "new")]
    argv = ["--config", str(CONFIG), *paths, *SMALLER, "--train-iters", "2"]
    assert run_ranks(pretrain, 4, argv) == [0] * 4
    steps = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["sppo/ref_drift_step0"] < 0.02  # bfloat16
    assert "perf/slowest_rank_over_median" not in steps[0]  # of the step before, and there is none
    assert steps[1]["perf/slowest_rank_over_median"] >= 1
    assert not any("mfu" in name or name.startswith("gpu/") for name in steps[0])  # there is no GPU to speak of
