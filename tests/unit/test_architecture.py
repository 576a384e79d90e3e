"""Proves that model.json round-trips, counts parameters as published models do, and refuses what it does not know."""

import json

import pytest

from megatron_sppo.architecture import Architecture
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.layer_parts import RopeScaling
from megatron_sppo.model_file import read_architecture, write_architecture
from megatron_sppo.weight_counts import num_parameters

SMOLLM2_135M = {
    "family": "llama",
    "num_layers": 30,
    "hidden_size": 576,
    "ffn_hidden_size": 1536,
    "num_attention_heads": 9,
    "num_query_groups": 3,
    "kv_channels": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 100000.0,
    "share_embeddings_and_output_weights": True,
}
LLAMA_3_1_8B = {
    **SMOLLM2_135M,
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 128256,
    "share_embeddings_and_output_weights": False,
}
QWEN2_5_0_5B = {
    **SMOLLM2_135M,
    "num_layers": 24,
    "hidden_size": 896,
    "ffn_hidden_size": 4864,
    "num_attention_heads": 14,
    "num_query_groups": 2,
    "vocab_size": 151936,
    "add_qkv_bias": True,
}
QWEN3_0_6B = {
    **SMOLLM2_135M,
    "num_layers": 28,
    "hidden_size": 1024,
    "ffn_hidden_size": 3072,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 151936,
    "qk_layernorm": True,
}

MIXTRAL_8X7B = {
    **LLAMA_3_1_8B,
    "vocab_size": 32000,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 14336,
}
GEMMA_2_9B = {
    **SMOLLM2_135M,
    "num_layers": 42,
    "hidden_size": 3584,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "kv_channels": 256,
    "vocab_size": 256000,
    "post_layernorm": True,
    "query_pre_attn_scalar": 256,
    "attention_softcap": 50.0,
    "sliding_window": 4096,
    "full_attention_layers": tuple(range(1, 42, 2)),
}
OLMO_2_7B = {
    **LLAMA_3_1_8B,
    "ffn_hidden_size": 11008,
    "num_query_groups": 32,
    "vocab_size": 100352,
    "pre_layernorm": False,
    "post_layernorm": True,
    "qk_layernorm": True,
    "qk_layernorm_across_heads": True,
}
QWEN3_30B_A3B = {
    **LLAMA_3_1_8B,
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 6144,
    "num_query_groups": 4,
    "vocab_size": 151936,
    "qk_layernorm": True,
    "num_moe_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
}


@pytest.mark.parametrize(
    ("values", "published"),
    [
        (SMOLLM2_135M, 134_515_008),
        (LLAMA_3_1_8B, 8_030_261_248),
        (QWEN2_5_0_5B, 494_032_768),
        (QWEN3_0_6B, 596_049_920),
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN3_30B_A3B, 30_532_122_624),
        (GEMMA_2_9B, 9_241_705_984),
        (OLMO_2_7B, 7_298_617_344),
    ],
    ids=[
        *("SmolLM2-135M", "Llama-3.1-8B", "Qwen2.5-0.5B", "Qwen3-0.6B", "Mixtral-8x7B", "Qwen3-30B-A3B"),
        *("Gemma-2-9B", "OLMo-2-7B"),
    ],
)
def test_parameters_are_counted_as_published(values, published):
    """Published: the safetensors index of each model on the hub."""
    assert num_parameters(Architecture(**values)) == published


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    ],
)
def test_model_json_reads_back_equal(tmp_path, scaling):
    architecture = Architecture(**LLAMA_3_1_8B, rope_scaling=scaling)
    tokenizer = {"hash": "0" * 64, "files": ["tokenizer.json"]}
    write_architecture(architecture, tmp_path, tokenizer=tokenizer)
    assert read_architecture(tmp_path) == (architecture, tokenizer)


def test_model_json_of_windows_and_caps_reads_back_equal(tmp_path):
    gemma = Architecture(**GEMMA_2_9B)
    write_architecture(gemma, tmp_path, tokenizer={})
    assert read_architecture(tmp_path) == (gemma, {})
    assert [gemma.window(layer) for layer in (0, 1, 40, 41)] == [4096, None, 4096, None]


@pytest.mark.parametrize(
    "values",
    [
        {"sliding_window": 0},
        {"attention_softcap": -1.0},
        {"logit_softcap": float("nan")},
        {"query_pre_attn_scalar": 0},
        {"full_attention_layers": (42,)},
        {"activation_func": "relu"},
        {"qk_layernorm_across_heads": True},
    ],
)
def test_an_attention_that_cannot_be_is_refused(values):
    with pytest.raises(ConversionError):
        Architecture(**{**GEMMA_2_9B, **values})


def test_model_json_of_a_mixture_reads_back_equal_and_a_dense_one_does_not_speak_of_experts(tmp_path):
    mixture = Architecture(**QWEN3_30B_A3B)
    write_architecture(mixture, tmp_path, tokenizer={})
    assert read_architecture(tmp_path) == (mixture, {})
    write_architecture(Architecture(**LLAMA_3_1_8B), tmp_path, tokenizer={})
    assert "moe" not in (tmp_path / "model.json").read_text()


@pytest.mark.parametrize(
    "values",
    [
        {"num_moe_experts": None},
        {"moe_router_topk": 129},
        {"moe_router_topk": 1},
        {"moe_ffn_hidden_size": None},
        {"moe_router_topk": 0},
    ],
)
def test_a_mixture_that_cannot_be_is_refused(values):
    with pytest.raises(ConversionError):
        Architecture(**{**QWEN3_30B_A3B, **values})


def changed(tmp_path, change) -> None:
    write_architecture(Architecture(**SMOLLM2_135M), tmp_path, tokenizer={})
    content = json.loads((tmp_path / "model.json").read_text())
    change(content)
    (tmp_path / "model.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(schema_version=2), "schema version"),
        (lambda content: content.pop("tokenizer"), "tokenizer"),
        (lambda content: content.update(architecture=[]), "architecture"),
        (lambda content: content["architecture"].update(num_experts=8), "num_experts"),
        (lambda content: content["architecture"].pop("num_layers"), "num_layers"),
        (lambda content: content["architecture"].update(num_layers=0), "num_layers is 0"),
        (lambda content: content["architecture"].update(num_query_groups=4), "num_query_groups"),
        (lambda content: content["architecture"].update(rope_scaling={"factor": 8}), "describe"),
    ],
)
def test_a_model_json_that_cannot_be_true_is_refused_in_one_line(tmp_path, change, words):
    changed(tmp_path, change)
    with pytest.raises(ConversionError) as caught:
        read_architecture(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_model_json_is_named(tmp_path):
    with pytest.raises(DataError, match="model.json"):
        read_architecture(tmp_path)
