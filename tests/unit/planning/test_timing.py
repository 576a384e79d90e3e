"""Times and traffic: arithmetic on round numbers, three published runs, and four measured on an H200."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.planning.architectures import PUBLISHED
from megatron_sppo.planning.communication import step_traffic
from megatron_sppo.planning.config import MachineConfig, PlanConfig, SubjectConfig, WorkloadConfig
from megatron_sppo.planning.parameters import Grid
from megatron_sppo.planning.plan import make_plan, make_report
from megatron_sppo.planning.timing import stage_seconds, step_time, workload
from megatron_sppo.training.config import BatchConfig, ObjectiveConfig, ParallelConfig

LLAMA_8B = PUBLISHED["llama3-8b"]
MEASURED = Path(__file__).resolve().parents[3] / "benchmarks/results/h200"


def plan_config(layout: dict[str, Any], *, batch: int = 128, tokens: float = 512, **rest: Any) -> PlanConfig:
    return PlanConfig(
        batch=BatchConfig(micro_batch_size=1, global_batch_size=batch, seq_length=8192),
        workload=WorkloadConfig(mean_prompt_tokens=1, mean_response_tokens=tokens - 1),
        parallel=ParallelConfig(**layout),
        **rest,
    )


@pytest.mark.parametrize(
    ("model", "world_size", "layout", "fp8", "batch", "tokens", "recompute", "published"),
    [
        # NVIDIA, fine-tuning in FP8 on 32 H100, sequences of 4096.
        (
            "llama3-70b",
            32,
            {
                "tensor_model_parallel_size": 4,
                "sequence_parallel": True,
                "pipeline_model_parallel_size": 4,
                "virtual_pipeline_model_parallel_size": 5,
                "use_distributed_optimizer": True,
            },
            "hybrid",
            32,
            4096,
            "none",
            1638,
        ),
        # NVIDIA, pre-training in FP8 on 8 H100, sequences of 8192.
        (
            "llama3-8b",
            8,
            {"context_parallel_size": 2, "use_distributed_optimizer": True},
            "hybrid",
            128,
            8192,
            "none",
            14451,
        ),
        # torchtitan, bfloat16 on 8 H100 (its FSDP moves as much as the distributed optimizer).
        ("llama3-8b", 8, {"use_distributed_optimizer": True}, "none", 8, 8192, "full", 6667),
    ],
)
def test_published_runs_are_met_within_a_quarter(
    model: str, world_size: int, layout: dict, fp8: str, batch: int, tokens: float, recompute: str, published: float
) -> None:
    config = plan_config(
        layout, batch=batch, tokens=tokens, model=ModelConfig(fp8=fp8, recompute_granularity=recompute)
    )
    step = step_time(PUBLISHED[model], config, Grid(parallel=config.parallel, world_size=world_size))
    assert step.tokens_per_gpu(world_size) == pytest.approx(published, rel=0.25)


@pytest.mark.parametrize("fp8", ["none", "hybrid"])
@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_steps_of_an_h200_are_met_within_a_quarter(shape: str, fp8: str) -> None:
    """G2 (benchmarks/train_gpu.py): 64 documents of 512 tokens, 16 in a micro-batch; of the 8B model eight layers."""
    rows = json.loads((MEASURED / f"train_gpu_{shape}.json").read_text())["rows"]
    precision = "bf16" if fp8 == "none" else "FP8 tensorwise"
    (measured,) = (row["ours"] for row in rows if row["metric"].startswith(f"tokens/s, {shape} shape, {precision},"))
    config = PlanConfig(
        batch=BatchConfig(micro_batch_size=16, global_batch_size=64, seq_length=512),
        workload=WorkloadConfig(mean_prompt_tokens=160, mean_response_tokens=352),
        model=ModelConfig(fp8=fp8),  # type: ignore[arg-type]
    )
    model = PUBLISHED["llama3.2-1b"] if shape == "1b" else dataclasses.replace(LLAMA_8B, num_layers=8)
    step = step_time(model, config, Grid(parallel=config.parallel, world_size=1))
    assert step.tokens_per_gpu(1) == pytest.approx(measured, rel=0.25)


def test_a_pipeline_idles_for_all_stages_but_one() -> None:
    """4 stages, 128 / 8 = 16 micro-batches: 3 / (16 + 3) of the time; two chunks a stage halve what is idle."""
    config = plan_config({"pipeline_model_parallel_size": 4})
    grid = Grid(parallel=config.parallel, world_size=32)
    assert step_time(LLAMA_8B, config, grid).bubble_fraction == pytest.approx(3 / 19)
    config = plan_config({"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2})
    grid = Grid(parallel=config.parallel, world_size=32)
    assert step_time(LLAMA_8B, config, grid).bubble_fraction == pytest.approx(1.5 / 17.5)


def traffic(layout: dict[str, Any], world_size: int, architecture: Any = LLAMA_8B) -> dict[str, tuple[float, float]]:
    grid = Grid(parallel=ParallelConfig(**layout), world_size=world_size)
    lines = step_traffic(architecture, ModelConfig(), grid, MachineConfig(), tokens_per_rank=1000)
    return {line.axis: (line.num_bytes, line.seconds) for line in lines}


def test_traffic_is_what_rings_move() -> None:
    """Llama-3-8B (32 layers, H = 4096, 8 key/value heads of 128), 1000 tokens, bfloat16, (p - 1) / p a pass."""
    assert traffic({}, 1) == {}
    tensor = traffic({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4)
    assert tensor["tensor"][0] == 32 * 10 * 1000 * 4096 * 2 * 3 / 4
    assert set(tensor) == {"tensor"}
    pipeline = traffic({"pipeline_model_parallel_size": 4}, 4)
    assert pipeline["pipeline"][0] == 2 * 1000 * 4096 * 2
    context = traffic({"context_parallel_size": 2, "use_distributed_optimizer": True}, 2)
    assert context["context"][0] == 32 * 3 * 1000 * 2 * 8 * 128 * 2
    data = traffic({"use_distributed_optimizer": True}, 8)
    weights = 8_030_261_248
    assert data["gradients"][0] == pytest.approx(4 * weights * 7 / 8, rel=1e-4)
    assert data["weights"][0] == pytest.approx(2 * weights * 7 / 8, rel=1e-4)
    assert traffic({}, 8)["gradients"][0] == pytest.approx(8 * weights * 7 / 8, rel=1e-4)


def test_an_axis_that_leaves_the_node_takes_the_network() -> None:
    machine = MachineConfig()
    inside, outside = traffic({}, 8)["gradients"], traffic({}, 16)["gradients"]
    assert inside[1] == pytest.approx(inside[0] / machine.node_gb_per_s / 1e9)
    assert outside[1] == pytest.approx(outside[0] / machine.network_gb_per_s / 1e9)
    experts = traffic({"expert_model_parallel_size": 8}, 16, PUBLISHED["qwen3-30b-a3b"])["expert"]
    assert experts[0] == 48 * 2 * 1000 * 8 * 2048 * 2 * 7 / 8 * 2
    assert experts[1] == pytest.approx(experts[0] / machine.node_gb_per_s / 1e9)


@pytest.mark.parametrize(
    ("objective", "selection", "trained", "expected"),
    [
        ("sppo", None, None, 50),
        ("sppo", "extremes", None, 20),
        ("dpo", None, None, 20),
        ("sppo", None, 3, 30),
        ("dpo", "all", None, 200),
        ("sppo_hard", "all", 12, 120),
        ("dpo", "all", 99, 200),
        ("sppo", "all", 99, 50),
    ],
)
def test_rows_of_an_iteration(objective: str, selection: str | None, trained: int | None, expected: int) -> None:
    """10 prompts of 5 answers; all of their 10 pairs are 20 rows of a prompt."""
    config = PlanConfig(
        objective=ObjectiveConfig(objective=objective),
        batch=BatchConfig(global_batch_size=8, micro_batch_size=2, selection=selection),
        workload=WorkloadConfig(num_prompts=10, num_responses=5, responses_trained=trained),
    )
    work = workload(config)
    assert (work.num_rows, work.num_steps) == (expected, -(-expected // 8))


def test_each_further_reference_is_one_more_pass() -> None:
    """inpo has one whatever is given; mnpo as many as are."""
    grid = Grid(parallel=ParallelConfig(), world_size=8)
    batch = BatchConfig(micro_batch_size=2, global_batch_size=16)
    seconds = {}
    for name, references in (("ipo", ()), ("inpo", ()), ("mnpo", (Path("a"), Path("b")))):
        objective = ObjectiveConfig(objective=name)
        config = PlanConfig(objective=objective, batch=batch, reference=references)
        step = step_time(LLAMA_8B, config, grid)
        seconds[name] = stage_seconds(LLAMA_8B, config, grid, step)["reference pass"]
    assert seconds["inpo"] == pytest.approx(2 * seconds["ipo"]) and seconds["mnpo"] == pytest.approx(3 * seconds["ipo"])


def test_what_does_not_fit_says_what_to_do() -> None:
    config = plan_config({}, model=ModelConfig())
    plan = make_plan(LLAMA_8B, config, world_size=1)
    assert not plan.fits and "80" in plan.advice[0] and "model-parallel" in plan.advice[0]
    small = make_plan(PUBLISHED["smollm2-135m"], config, world_size=1)
    assert small.fits


def test_what_training_would_refuse_is_refused() -> None:
    config = dataclasses.replace(plan_config({"tensor_model_parallel_size": 3}), plan=SubjectConfig(model="llama3-8b"))
    with pytest.raises(ConfigError, match="does not divide"):
        make_report(config, config_file=None)
    with pytest.raises(ConfigError, match="global-batch-size"):
        make_plan(LLAMA_8B, plan_config({}, batch=100), world_size=8)
    with pytest.raises(ConfigError, match="no built-in model"):
        make_report(dataclasses.replace(config, plan=SubjectConfig(model="llama9")), config_file=None)
