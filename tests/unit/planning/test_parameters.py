"""Number of weights against the published ones, and shards and buffers against the real sharded model.

The real model is built for every kind of rank of a world by torch's fake process group: shapes are Megatron-Core's.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.simulation import simulated_rank
from megatron_sppo.layer_parts import DeltaNet
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.planning.activations import MicroBatchShape
from megatron_sppo.planning.architectures import PUBLISHED, find_architecture
from megatron_sppo.planning.memory import stage_memory
from megatron_sppo.planning.parameters import Grid, buffer_elements, count, stage_shards
from megatron_sppo.training.config import OptimizationConfig, ParallelConfig
from megatron_sppo.training.optimizer import build_optimizer
from megatron_sppo.training.policy import build_policy
from megatron_sppo.weight_counts import num_parameters
from tests.unit.planning.models import LATENTS, MIXTURE, TINY

DELTA_NET = DeltaNet(
    linear_attention_freq=(1, 1, 0, 1),
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)
SHARED_EXPERT = {"moe_shared_expert_intermediate_size": 160}
_AIR_ATTENTION = 2 * 4096 * 12288 + 2 * 4096 * 1024 + 14336 + 2 * 4096
_ATTENTION = 2 * 5120 * 12288 + 2 * 5120 * 1024 + 14336 + 2 * 5120 + 2 * 128
FURTHER_LAYER_OF_AIR = _AIR_ATTENTION + 129 * 3 * 4096 * 1408 + 128 * 4097 + 2 * 4096**2 + 3 * 4096 + 2 * 151552 * 4096
FURTHER_LAYER = _ATTENTION + 161 * 3 * 5120 * 1536 + 160 * 5121 + 2 * 5120**2 + 3 * 5120 + 2 * 151552 * 5120
# Layers of Qwen's that predict a further token: attention, unit or experts, five norms and a projection of two inputs.
_NEXT = 2048 * (8192 + 2 * 512 + 4096) + 513 * 3 * 2048 * 512 + 513 * 2048 + 2 * 256
FURTHER_LAYER_OF_NEXT = _NEXT + 2 * 2048**2 + 5 * 2048
FURTHER_LAYER_OF_27B = 5120 * (12288 + 2 * 1024 + 6144) + 3 * 5120 * 17408 + 2 * 256 + 2 * 5120**2 + 5 * 5120
# 27 layers of 1152 channels with biases, embeddings of patches and positions, and a projection of four patches at once.
_VISION_LAYER = 4 * 1152**2 + 4 * 1152 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
VISION_OF_27B = 27 * _VISION_LAYER + 1536 * 1152 + 1152 + 2304 * 1152 + 2304 + 4608 * 4609 + 4609 * 5120
# DeepSeek-V3's layer that predicts a further token: latent attention, experts, a projection of two inputs, five norms,
# and copies of embedding and output weights; and scales of FP8 blocks, which the hub counts with 59 routers' biases.
_LATENT_ATTENTION = 7168 * (1536 + 576 + 16384) + 1536 * 24576 + 512 * 32768 + 1536 + 512
_V3_EXPERTS = 257 * 3 * 7168 * 2048 + 256 * 7169
FURTHER_LAYER_OF_V3 = _LATENT_ATTENTION + _V3_EXPERTS + 2 * 7168**2 + 5 * 7168 + 2 * 129280 * 7168
SCALES_OF_V3 = 41_555_600 - 59 * 256
# As the models' cards and papers count them.
PUBLISHED_WEIGHTS = {
    "smollm2-135m": 134_515_008,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    # As the hub counts them, without layer 46 or 92, which predicts a further token: a layer with experts, norms and
    # a projection of their outputs, a norm, and copies of embedding and output weights.
    "glm-4.5-air": 110_468_824_832 - FURTHER_LAYER_OF_AIR,
    "glm-4.5": 358_337_791_296 - FURTHER_LAYER,
    "qwen3-next-80b-a3b": 81_324_862_720 - FURTHER_LAYER_OF_NEXT,
    "qwen3.6-27b": 27_781_427_952 - FURTHER_LAYER_OF_27B - VISION_OF_27B,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 684_531_386_000 - FURTHER_LAYER_OF_V3 - SCALES_OF_V3,
    "kimi-k2": 1_026_408_232_448,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
}

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "one rank, tied": (1, {}, {"share_embeddings_and_output_weights": True}),
    "one rank, bias and norms of queries": (1, {}, {"add_qkv_bias": True, "qk_layernorm": True}),
    "one rank, biases and sinks": (
        1,
        {},
        {"add_qkv_bias": True, "add_proj_bias": True, "add_mlp_bias": True, "softmax_type": "learnable"},
    ),
    "TP2, biases and sinks": (
        2,
        {"tensor_model_parallel_size": 2},
        {"add_proj_bias": True, "add_mlp_bias": True, "softmax_type": "learnable"},
    ),
    "DP4": (4, {}, {}),
    "TP2 DP2": (4, {"tensor_model_parallel_size": 2}, {}),
    "TP2 SP PP2 DP2": (
        8,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
        {},
    ),
    "PP2, tied": (2, {"pipeline_model_parallel_size": 2}, {"share_embeddings_and_output_weights": True}),
    "PP2 VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}),
    "TP2 SP, gated attention and delta nets": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"attention_output_gate": True, "qk_layernorm": True, "delta_net": DELTA_NET},
    ),
    "TP2 SP, latent attention": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, LATENTS),
    "CP2 DP3": (6, {"context_parallel_size": 2}, {}),
    "mixture": (1, {}, MIXTURE),
    "mixture EP2 DP2": (4, {"expert_model_parallel_size": 2}, MIXTURE),
    "mixture TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, MIXTURE),
    "mixture TP2 SP EP2 DP2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
        MIXTURE,
    ),
    "mixture, gated shared expert, dense between, PP2 VPP2": (
        4,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        MIXTURE | SHARED_EXPERT | {"moe_shared_expert_gate": True, "moe_layer_freq": (0, 1, 1, 0)},
    ),
    "mixture, shared expert, dense in front, TP2 SP PP2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "decoder_first_pipeline_num_layers": 1,
        },
        MIXTURE | SHARED_EXPERT | {"moe_layer_freq": (0, 0, 1, 1)},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_built_in_model_has_as_many_weights_as_published(name: str) -> None:
    assert num_parameters(PUBLISHED[name]) == PUBLISHED_WEIGHTS[name]


@pytest.mark.parametrize(
    ("file", "name"),
    [("llama3_70b_h100.yaml", "llama3-70b"), ("mistral_7b_paper.yaml", "mistral-7b"), ("qwen3_8b.yaml", "qwen3-8b")],
)
def test_a_config_file_s_name_begins_with_the_model_s(file: str, name: str) -> None:
    assert find_architecture(None, config_file=Path("configs", file))[1] == PUBLISHED[name]


@pytest.mark.parametrize("distributed", [False, True], ids=["DDP", "distributed optimizer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_and_optimizer_state_are_those_of_the_real_model(layout: str, distributed: bool) -> None:
    world_size, axes, fields = LAYOUTS[layout]
    architecture = dataclasses.replace(TINY, **fields)
    parallel = ParallelConfig(use_distributed_optimizer=distributed, **axes)
    grid = Grid(parallel=parallel, world_size=world_size)
    stages = parallel.pipeline_model_parallel_size
    model = ModelConfig(params_dtype="bfloat16", transformer_impl="torch")
    shape = MicroBatchShape(num_tokens=64, num_response_tokens=64, sum_of_squares=0)
    for stage in range(stages):
        with simulated_rank(parallel, rank=stage * world_size // stages, world_size=world_size):
            policy = build_policy(architecture, model, parallel)
            chunks = stage_shards(architecture, grid, stage)
            for chunk, shards in zip(policy.chunks, chunks, strict=True):
                parameters = list(chunk.module.parameters())
                assert sorted(shard.numel for shard in shards) == sorted(p.numel() for p in parameters)
                for is_expert, buffers in ((False, chunk.buffers), (True, chunk.expert_parallel_buffers)):
                    assert buffer_elements(shards, grid, is_expert=is_expert) == sum(b.numel for b in buffers)
            for name, bytes_per_parameter in (("adam", 12), ("rmsprop", 8)):  # float32: the weight and its moments
                settings = {"stage": stage, "num_micro_batches": 1, "optimizer": name, "engine": False, "machine": None}
                memory = stage_memory(architecture, model, grid, shape, **settings)
                assert memory.num_parameters == sum(count(shards) for shards in chunks)
                assert memory.gradients == sum(b.grad_data.nbytes for c in policy.chunks for b in _buffers(c))
                held = _optimizer_bytes(policy, parallel, model, name)
                # The padding of the last share is in the plan, and not in the state.
                assert memory.optimizer * 0.97 <= held <= memory.optimizer
                assert distributed or held == memory.num_parameters * bytes_per_parameter


def _buffers(chunk: Any) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _optimizer_bytes(policy: Any, parallel: ParallelConfig, model: ModelConfig, name: str) -> int:
    """Step once with zero gradients, so that the moments exist, and add up what the optimizer holds."""
    config = OptimizationConfig(lr=1e-6, clip_grad=0, optimizer=name)
    optimizer = build_optimizer(policy.chunks, config, model, parallel)
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    optimizer.step()
    held: dict[int, int] = {}
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if chained.optimizer is None:
            continue
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                tensors = [parameter, *(v for v in chained.optimizer.state[parameter].values())]
                held |= {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.ndim}
    return sum(held.values())
