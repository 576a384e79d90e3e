"""Plans of published mixtures on 64 and 256 H100: what a rank holds, by arithmetic written out here; and it fits."""

from typing import Any

import pytest

from megatron_sppo.flops import all_layers_flops_per_token, head_flops_per_token
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.planning.architectures import PUBLISHED
from megatron_sppo.planning.config import PlanConfig, WorkloadConfig
from megatron_sppo.planning.plan import Plan, make_plan
from megatron_sppo.training.config import BatchConfig, OptimizationConfig, ParallelConfig
from tests.unit.planning.test_parameters import PUBLISHED_WEIGHTS

# Tensor- and expert-parallel ranks, and what one of them holds of a layer: attention with norms, one expert, and so on.
GLM_AIR: dict[str, Any] = {
    "tensor": 1,
    "experts": 16,
    # q and o 2 x 4096 x 12288, k and v 2 x 4096 x 1024, biases 12288 + 2 x 1024, two norms
    "attention": 2 * 4096 * 12288 + 2 * 4096 * 1024 + 14336 + 2 * 4096,
    "dense": 3 * 4096 * 10944,
    "expert": 3 * 4096 * 1408,
    "router": 128 * 4096,
    "shared": 3 * 4096 * 1408,
}
QWEN3: dict[str, Any] = {
    "tensor": 2,
    "experts": 32,
    # halves of q and o 2 x 4096 x 8192 and of k and v 2 x 4096 x 512; norms over heads 2 x 128, two norms
    "attention": (2 * 4096 * 8192 + 2 * 4096 * 512) // 2 + 256 + 2 * 4096,
    "dense": 0,
    "expert": 3 * 4096 * 1536,
    "router": 128 * 4096,
    "shared": 0,
}


def plan(name: str, world_size: int, numbers: dict[str, Any]) -> Plan:
    config = PlanConfig(
        model=ModelConfig(recompute_granularity="full"),
        optimization=OptimizationConfig(optimizer="rmsprop", lr=5e-7),
        batch=BatchConfig(micro_batch_size=1, global_batch_size=512, seq_length=4096, packing=False),
        workload=WorkloadConfig(mean_prompt_tokens=200, mean_response_tokens=600),
        parallel=ParallelConfig(
            tensor_model_parallel_size=numbers["tensor"],
            sequence_parallel=numbers["tensor"] > 1,
            pipeline_model_parallel_size=2,
            expert_model_parallel_size=numbers["experts"],
            use_distributed_optimizer=True,
        ),
    )
    return make_plan(PUBLISHED[name], config, world_size=world_size)


@pytest.mark.parametrize("world_size", [64, 256])
@pytest.mark.parametrize(
    ("name", "numbers", "layers", "dense_in_front", "vocabulary"),
    [("glm-4.5-air", GLM_AIR, 46, 1, 151552), ("qwen3-235b-a22b", QWEN3, 94, 0, 151936)],
)
def test_what_a_rank_of_each_stage_holds(
    name: str, numbers: dict[str, Any], layers: int, dense_in_front: int, vocabulary: int, world_size: int
) -> None:
    """Half of the layers and one of embedding and output weight a stage.

    bfloat16 weights and float32 gradients, 6 bytes; RMSprop's masters and moments, 8, over those who hold the same:
    the ranks of a stage over the tensor-parallel ones for what is dense, over the expert-parallel ones for the experts.
    """
    made = plan(name, world_size, numbers)
    stage_ranks, each = world_size // 2, layers // 2
    copies = stage_ranks // numbers["tensor"]
    sequence = " SP" if numbers["tensor"] > 1 else ""
    assert made.fits and made.layout == f"TP{numbers['tensor']}{sequence} PP2 EP{numbers['experts']} DP{copies}"
    for stage, memory in enumerate(made.stages):
        sparse = each - (dense_in_front if stage == 0 else 0)
        experts = sparse * 128 // numbers["experts"] * numbers["expert"]
        rest = each * numbers["attention"] + sparse * (numbers["router"] + numbers["shared"])
        rest += (
            (each - sparse) * numbers["dense"] + vocabulary // numbers["tensor"] * 4096 + (4096 if stage == 1 else 0)
        )
        assert memory.num_parameters == experts + rest
        held = 6 * (experts + rest) + 8 * (rest / copies + experts / (stage_ranks // numbers["experts"]))
        assert memory.resident == pytest.approx(held, rel=1e-4)  # buffers are aligned


# Layouts, and how many weights are of experts: each has three matrices, in gpt-oss three biases too.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt-oss-120b": {"tensor": 1, "experts": 16, "of_experts": 36 * 128 * 3 * (2880**2 + 2880)},
    "qwen3-next-80b-a3b": {"tensor": 2, "experts": 16, "of_experts": 48 * 512 * 3 * 2048 * 512},
    "qwen3.6-27b": {"tensor": 4, "experts": 1, "of_experts": 0},
}


@pytest.mark.parametrize("world_size", [64, 256])
@pytest.mark.parametrize("name", OTHERS)
def test_the_ranks_of_a_layout_that_fits_hold_the_model(name: str, world_size: int) -> None:
    """Tensor-parallel ranks divide what is dense, expert-parallel ones the experts; each holds norms and routers."""
    numbers = OTHERS[name]
    made = plan(name, world_size, numbers)
    held = sum(stage.num_parameters for stage in made.stages)
    dense = PUBLISHED_WEIGHTS[name] - numbers["of_experts"]
    assert made.fits and "PP2" in made.layout
    assert held == pytest.approx(dense / numbers["tensor"] + numbers["of_experts"] / numbers["experts"], rel=1e-2)


def test_a_token_meets_the_chosen_experts_and_the_shared_one() -> None:
    """GLM-4.5-Air: 46 layers' attention, 45 layers' router, 8 experts and the shared one, one dense layer.

    Twelve billion weights, as published; beside them 600 of 800 tokens meet the output weight. Two FLOPs a weight and
    pass, three passes; scores and values cost 4 x 12288 for each of the 801 / 2 positions that a token sees.
    """
    step = plan("glm-4.5-air", 64, GLM_AIR).step
    matrices = 2 * 4096 * 12288 + 2 * 4096 * 1024
    active = 46 * matrices + 45 * (128 * 4096 + 9 * GLM_AIR["expert"]) + GLM_AIR["dense"]
    assert round(active / 1e9) == 12
    flops = 3 * (2 * (active + 0.75 * 151552 * 4096) + 46 * 4 * 12288 * 801 / 2) * step.num_tokens
    assert step.model_flops == pytest.approx(flops, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "billions"), [("deepseek-v2-lite", 2.4), ("deepseek-v2", 21), ("deepseek-v3", 37), ("kimi-k2", 32)]
)
def test_a_token_meets_as_many_weights_as_published_with_latent_attention(name: str, billions: float) -> None:
    """As the models' cards count activated parameters: two FLOPs a weight, of the layers and the output weight."""
    architecture = PUBLISHED[name]
    met = (all_layers_flops_per_token(architecture) + head_flops_per_token(architecture)) / 2
    assert met == pytest.approx(billions * 1e9, rel=0.03)


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2"])
def test_latent_attention_and_its_experts_fit_on_256_gpus(name: str) -> None:
    """61 layers on four stages, 16 on the first, and a quarter of a node's heads on each of its GPUs."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        pipeline_model_parallel_size=4,
        decoder_first_pipeline_num_layers=16,
        expert_model_parallel_size=64,
        use_distributed_optimizer=True,
    )
    config = PlanConfig(
        model=ModelConfig(recompute_granularity="full"),
        optimization=OptimizationConfig(optimizer="rmsprop", lr=5e-7),
        batch=BatchConfig(micro_batch_size=1, global_batch_size=512, seq_length=4096, packing=False),
        workload=WorkloadConfig(mean_prompt_tokens=200, mean_response_tokens=600),
        parallel=parallel,
    )
    made = make_plan(PUBLISHED[name], config, world_size=256)
    assert made.fits
    # A rank holds 1 / 64 of its stage's experts, a quarter of what heads and channels divide, and the rest whole.
    experts = PUBLISHED[name].num_expert_layers * (PUBLISHED[name].num_moe_experts or 0)
    matrices = experts * 3 * 7168 * 2048
    whole = 61 * (7168 * (1536 + 512 + 64) + 1536 + 512 + 2 * 7168) + 7168 + experts * 7168
    divided = PUBLISHED_WEIGHTS[name] - matrices - whole - experts  # without the routers' biases
    assert sum(stage.num_parameters for stage in made.stages) == matrices // 64 + whole + divided // 4
