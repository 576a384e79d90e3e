"""Settings of the model that are refused, and the sizes that are rounded."""

import dataclasses
import math

import pytest

from megatron_sppo.architecture import Architecture
from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import ModelConfig, check_divisibility, padded_vocab_size, token_multiple
from megatron_sppo.model.transformer_config import bfloat16_products, transformer_config
from megatron_sppo.model.transformer_engine import check_machine
from megatron_sppo.planning.architectures import PUBLISHED

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=259,
    max_position_embeddings=512,
    layernorm_epsilon=1e-5,
    rotary_base=1e4,
    share_embeddings_and_output_weights=False,
)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, "Blackwell"),
        ({"fp8": "hybrid", "fp8_recipe": "nvfp4"}, "Blackwell"),
        ({"fp8": "hybrid", "params_dtype": "float32"}, "bfloat16"),
        ({"fp8": "hybrid", "fp8_recipe": "delayed", "first_last_layers_bf16": True}, "first_last_layers_bf16"),
        ({"head_chunk_size": 0}, "head_chunk_size"),
        ({"moe_aux_loss_coeff": -0.1}, "moe_aux_loss_coeff is -0.1"),
        ({"moe_z_loss_coeff": -0.1}, "moe_z_loss_coeff is -0.1"),
    ],
)
def test_a_setting_that_cannot_run_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**settings)


def test_fp8_is_refused_on_a_machine_without_cuda_but_can_be_read_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = ModelConfig(fp8="hybrid")
    with pytest.raises(ConfigError, match="--fp8 none"):
        check_machine(config)


@pytest.mark.parametrize(
    ("settings", "tensor", "sequence_parallel", "expected"),
    [
        ({}, 4, False, 1),
        ({}, 4, True, 4),
        ({"fp8": "hybrid"}, 1, False, 16),
        ({"fp8": "hybrid"}, 4, True, 64),
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, 2, True, 256),
    ],
)
def test_tokens_are_padded_to_what_the_kernels_want(
    settings: dict, tensor: int, sequence_parallel: bool, expected: int
) -> None:
    config = ModelConfig(**settings)
    assert token_multiple(config, tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel) == expected


@pytest.mark.parametrize("vocab_size", [259, 32000, 49152, 128256])
@pytest.mark.parametrize("tensor", [1, 2, 3, 8])
def test_the_padded_vocabulary_divides_and_is_the_least(vocab_size: int, tensor: int) -> None:
    padded = padded_vocab_size(vocab_size, tensor)
    assert padded % tensor == 0 and padded % 128 == 0
    assert vocab_size <= padded < vocab_size + math.lcm(128, tensor)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("no_such=1", "no such field"),
        ("num_layers=3", "decided by"),
        ("recompute_granularity", "KEY=VALUE"),
        ("overlap_p2p_comm=false", "wrong losses in silence"),
        ("batch_p2p_comm=true", "wrong losses in silence"),
        ("batch_p2p_sync=true", "wrong losses in silence"),
        ("use_ring_exchange_p2p=true", "wrong losses in silence"),
        ("overlap_p2p_comm_warmup_flush=true", "wrong losses in silence"),
        ("variable_seq_lengths=true", "one shape already"),
        ("fp8=hybrid", "decided by"),  # else the host's default recipe, delayed, would be reached unnamed
        ("fp4=e2m1", "Blackwell"),
        ("tp_comm_overlap=true", "one number of tokens.*overlap_grad_reduce=true"),
        ("enable_cuda_graph=true", "tensors of one shape"),
        ("external_cuda_graph=true", "tensors of one shape"),
        ("cuda_graph_impl=local", "tensors of one shape"),
        ("cuda_graph_scope=attn", "tensors of one shape"),
        ("moe_enable_routing_replay=true", "both passes choose the same experts"),
        ("bias_activation_fusion=abc", "takes true or false"),
        ("num_layers_at_start_in_bf16=one", "takes a whole number"),
        ("cpu_offloading=true", "--recompute-granularity full"),
        ("fine_grained_activation_offloading=true", "--recompute-granularity full"),
    ],
)
def test_a_host_field_that_is_unknown_or_ours_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        transformer_config(ARCHITECTURE, ModelConfig(transformer_config=(override,)))


def test_freeing_sent_activations_is_refused_where_gloo_sends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="wrong losses in silence"):
        transformer_config(ARCHITECTURE, ModelConfig(transformer_config=("deallocate_pipeline_outputs=true",)))


def test_a_host_field_is_reachable_without_being_listed() -> None:
    config = transformer_config(ARCHITECTURE, ModelConfig(transformer_config=("fp32_residual_connection=true",)))
    assert config.fp32_residual_connection is True


def test_what_the_host_refuses_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="Megatron-Core refuses"):
        transformer_config(ARCHITECTURE, ModelConfig(transformer_config=("recompute_granularity=nonsense",)))


MIXTURE = dataclasses.replace(
    ARCHITECTURE, family="mixtral", num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32
)


def test_router_losses_of_a_dense_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="this model is dense"):
        transformer_config(ARCHITECTURE, ModelConfig(moe_z_loss_coeff=1e-3))


def test_router_losses_are_refused_where_the_router_alone_is_recomputed() -> None:
    recomputed = ModelConfig(
        moe_aux_loss_coeff=1e-2, recompute_granularity="selective", transformer_config=("recompute_modules=[moe]",)
    )
    with pytest.raises(ConfigError, match="--recompute-granularity full"):
        transformer_config(MIXTURE, recomputed)


def test_the_hosts_own_router_losses_stay_off() -> None:
    """It would scale them by the number of tokens, and we divide by the number of sequences."""
    config = transformer_config(MIXTURE, ModelConfig(moe_aux_loss_coeff=1e-2, moe_z_loss_coeff=1e-3))
    assert config.moe_router_load_balancing_type == "none"
    assert not config.moe_aux_loss_coeff and config.moe_z_loss_coeff is None
    for host_field in ("moe_aux_loss_coeff=0.1", "moe_z_loss_coeff=0.1", "moe_router_load_balancing_type=aux_loss"):
        with pytest.raises(ConfigError, match="decided by"):
            transformer_config(MIXTURE, ModelConfig(transformer_config=(host_field,)))


LLAMA_70B = PUBLISHED["llama3-70b"]


@pytest.mark.parametrize(
    ("settings", "fields", "tensor", "words"),
    [
        # 28672 / 32 = 896 = 56 x 16; 64 x 128 / 32 = 256; but (64 + 16) x 128 / 32 = 320, no multiple of 128.
        ({"fp8_recipe": "blockwise"}, {}, 32, "10240 query, key and value channels / 32 .* = 320 .*size 16\\."),
        ({}, {"hidden_size": 8200}, 8, "multiples of 16: the model's 8200 channels of hidden_size are not.*--fp8 none"),
        # 1608 / 2 = 804 = 50.25 x 16; not on one rank either.
        ({}, {"ffn_hidden_size": 1608}, 2, "1608 feed-forward channels / 2 tensor-parallel ranks = 804 .*--fp8 none"),
        # 1632 / 2 = 816 = 51 x 16, but 6.375 x 128.
        ({"fp8_recipe": "blockwise"}, {"ffn_hidden_size": 1632}, 2, "= 816 are not. Use --fp8-recipe tensorwise"),
        ({}, {"ffn_hidden_size": 1616}, 2, "= 808 are not. Use --tensor-model-parallel-size 1"),  # 101 x 16
    ],
)
def test_fp8_refuses_matrices_of_other_sizes_by_their_arithmetic(
    settings: dict, fields: dict, tensor: int, words: str
) -> None:
    config = ModelConfig(fp8="hybrid", **settings)
    sizes = {"tensor_model_parallel_size": tensor, "expert_tensor_parallel_size": tensor}
    with pytest.raises(ConfigError, match=words):
        check_divisibility(config, dataclasses.replace(LLAMA_70B, **fields), **sizes)
    check_divisibility(ModelConfig(), dataclasses.replace(LLAMA_70B, **fields), **sizes)  # bfloat16 takes any


def test_fp8_takes_llama_3_70b_on_eight_ranks_in_every_recipe() -> None:
    for recipe in ("tensorwise", "blockwise", "delayed"):
        config = ModelConfig(fp8="hybrid", fp8_recipe=recipe)
        check_divisibility(config, LLAMA_70B, tensor_model_parallel_size=8, expert_tensor_parallel_size=8)


def test_fp8_s_settings_reach_megatron_core() -> None:
    """Built as for a GPU that is not here: nothing is computed."""
    config = transformer_config(ARCHITECTURE, ModelConfig(fp8="hybrid", first_last_layers_bf16=True))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", "tensorwise", False)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 1)
    with bfloat16_products(config):
        assert config.fp8 is None
    assert config.fp8 == "hybrid"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_value_has_the_bytes_that_torch_gives_it(name: str) -> None:
    config = ModelConfig(params_dtype=name)  # type: ignore[arg-type]
    assert config.type_bytes == config.dtype.itemsize
