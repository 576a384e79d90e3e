"""Proves which layouts fit a model, dense or with experts, and that what does not is refused with a size that does."""

import pytest

from megatron_sppo.architecture import Architecture
from megatron_sppo.errors import ConfigError
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.layout import check_layout

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


def test_experts_with_biases_are_not_split() -> None:
    """Megatron-Core adds the whole bias on each rank of a split expert, and then the ranks' answers up."""
    biases = {"add_qkv_bias": True, "add_proj_bias": True, "add_mlp_bias": True}
    biased = Architecture(**{**MIXTURE, "moe_ffn_hidden_size": 32, **biases})
    with pytest.raises(ConfigError, match="bias 2 times.*--expert-model-parallel-size 2"):
        check_layout(layout(tensor=2), biased, world_size=2)
    check_layout(layout(tensor=2, expert=2), biased, world_size=2)


def test_a_mixture_under_tensor_parallelism_needs_sequence_parallelism() -> None:
    alone = ParallelConfig(tensor_model_parallel_size=2)
    mixture = Architecture(**{**MIXTURE, "moe_ffn_hidden_size": 32})
    with pytest.raises(ConfigError, match="Add --sequence-parallel"):
        check_layout(alone, mixture, world_size=2)
    check_layout(alone, Architecture(**DENSE), world_size=2)


def stages(first: int | None, last: int | None, *, pipeline: int, virtual: int | None = None) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )


@pytest.mark.parametrize(
    ("num_layers", "config"),
    [
        (3, stages(2, None, pipeline=2)),
        (3, stages(None, 2, pipeline=2)),
        (3, stages(2, 1, pipeline=2)),
        (61, stages(13, None, pipeline=4)),  # 13 + 3 x 16
        (78, stages(9, 9, pipeline=8)),  # 9 + 6 x 10 + 9
        (14, stages(2, None, pipeline=4, virtual=2)),  # 2 + 3 x 4
    ],
)
def test_first_and_last_stage_may_have_other_numbers_of_layers(num_layers: int, config: ParallelConfig) -> None:
    model = Architecture(**{**DENSE, "num_layers": num_layers})
    check_layout(config, model, world_size=config.pipeline_model_parallel_size)


@pytest.mark.parametrize(
    ("num_layers", "config", "named"),
    [
        (3, stages(None, None, pipeline=2), "--decoder-first-pipeline-num-layers"),
        (3, stages(1, 1, pipeline=2), "leave 1, which cannot be divided evenly into 0"),
        (3, stages(3, None, pipeline=2), "leave 0"),
        (61, stages(12, None, pipeline=4), "leave 49.*into 3"),
        (13, stages(1, None, pipeline=4, virtual=2), "Use multiples of 2"),
        (9, stages(2, None, pipeline=4, virtual=2), "leave 7.*into 6"),
    ],
)
def test_stages_that_do_not_add_up_are_refused(num_layers: int, config: ParallelConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_layout(config, Architecture(**{**DENSE, "num_layers": num_layers}), world_size=4)


@pytest.mark.parametrize(("first", "pipeline"), [(2, 1), (0, 2)])
def test_a_first_stage_that_cannot_be_is_refused(first: int, pipeline: int) -> None:
    with pytest.raises(ConfigError, match="decoder_first_pipeline_num_layers is"):
        stages(first, None, pipeline=pipeline)
