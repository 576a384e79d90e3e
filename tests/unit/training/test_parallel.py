"""Proves which layouts fit a model, dense or with experts, and that what does not is refused with a size that does."""

import pytest

from megatron_sppo.architecture import Architecture
from megatron_sppo.errors import ConfigError
from megatron_sppo.training.parallel import ParallelConfig, check_layout

DENSE = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 1e4,
    "share_embeddings_and_output_weights": False,
}
MIXTURE = {**DENSE, "family": "mixtral", "num_moe_experts": 6, "moe_router_topk": 2, "moe_ffn_hidden_size": 31}


def layout(tensor: int = 1, pipeline: int = 1, context: int = 1, expert: int = 1) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        sequence_parallel=tensor > 1,
    )


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (2, {"expert": 2}),
        (3, {"expert": 3}),
        (6, {"expert": 6}),
        (4, {"expert": 2, "pipeline": 2}),
        (2, {"expert": 2, "tensor": 2}),  # experts lie whole on the tensor-parallel ranks: 31 channels do not matter
        (2, {"expert": 2, "context": 2}),
    ],
)
def test_experts_are_divided_over_any_ranks_of_a_stage(world_size: int, sizes: dict[str, int]) -> None:
    check_layout(layout(**sizes), Architecture(**MIXTURE), world_size=world_size)


@pytest.mark.parametrize(
    ("world_size", "sizes", "named"),
    [
        (4, {"expert": 4}, r"does not divide the model's 6 experts.*one of \[1, 2, 3, 6\]"),
        (4, {"expert": 3}, r"4 ranks of a pipeline stage.*one of \[1, 2\]"),
        (4, {"expert": 3, "pipeline": 2}, r"2 ranks of a pipeline stage"),
        (2, {"tensor": 2}, "31 feed-forward channels of an expert.*one of .1."),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(world_size: int, sizes: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_layout(layout(**sizes), Architecture(**MIXTURE), world_size=world_size)


def test_a_dense_model_has_no_experts_to_divide() -> None:
    with pytest.raises(ConfigError, match="this model is dense.*--expert-model-parallel-size 1"):
        check_layout(layout(expert=2), Architecture(**DENSE), world_size=2)


def test_a_mixture_under_tensor_parallelism_needs_sequence_parallelism() -> None:
    alone = ParallelConfig(tensor_model_parallel_size=2)
    mixture = Architecture(**{**MIXTURE, "moe_ffn_hidden_size": 32})
    with pytest.raises(ConfigError, match="Add --sequence-parallel"):
        check_layout(alone, mixture, world_size=2)
    check_layout(alone, Architecture(**DENSE), world_size=2)
