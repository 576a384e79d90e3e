"""Proves: config.json is read in both spellings; what the Megatron model would not compute is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.conversion.hf_config import architecture_from_hf, hf_from_architecture
from megatron_sppo.errors import ConversionError
from megatron_sppo.layer_parts import RopeScaling
from tests.models import MIXTURES, llama_config

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
DEEPSEEK_V2 = {**DEEPSEEK_V3, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def old_spelling(**changes: Any) -> dict[str, Any]:
    config = llama_config(**changes)
    del config["rope_parameters"]
    return config


def test_every_field_is_taken_over() -> None:
    read = architecture_from_hf(llama_config(num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-6, vocab_size=301))
    assert (read.num_layers, read.hidden_size, read.ffn_hidden_size) == (2, 64, 96)
    assert (read.num_attention_heads, read.num_query_groups, read.kv_channels) == (8, 2, 10)
    assert (read.vocab_size, read.max_position_embeddings, read.layernorm_epsilon) == (301, 512, 1e-6)
    assert (read.rotary_base, read.rope_scaling, read.share_embeddings_and_output_weights) == (10000.0, None, False)


def test_llama_31_scaling_is_read_in_both_spellings() -> None:
    new = llama_config(rope_parameters={"rope_theta": 500000.0, **LLAMA31})
    old = old_spelling(rope_theta=500000.0, rope_scaling=LLAMA31)
    expected = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    for config in (new, old):
        read = architecture_from_hf(config)
        assert read.rotary_base == 500000.0
        assert read.rope_scaling == expected


def test_llama_2_without_optional_keys_has_a_head_per_key_and_hidden_size_over_heads() -> None:
    config = old_spelling(rope_scaling=None)
    for key in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        del config[key]
    read = architecture_from_hf(config)
    assert (read.num_query_groups, read.kv_channels, read.rotary_base) == (8, 8, 10000.0)
    assert not read.share_embeddings_and_output_weights


@pytest.mark.parametrize("scaling", [None, LLAMA31, YARN, {**YARN, "truncate": False}, LONG])
def test_a_written_config_reads_back_the_same(scaling: dict[str, Any] | None) -> None:
    rope = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    read = architecture_from_hf(llama_config(rope_parameters=rope, tie_word_embeddings=True))
    assert architecture_from_hf(hf_from_architecture(read, dtype="bfloat16")) == read


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        # What transformers 5 wrote, and what somebody added to it in the spelling of transformers 4.
        (
            {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "rope_scaling": YARN},
            "twice, and differently",
        ),
        ({"rope_parameters": {"rope_theta": 1e5}, "rope_scaling": LLAMA31}, "twice, and differently"),
        ({"rope_parameters": {"rope_theta": 1e5, **LLAMA31}, "rope_scaling": LLAMA31}, "twice, and differently"),
        ({"rope_parameters": {"rope_theta": 1e5}, "rope_scaling": {"rope_type": "default"}}, "twice, and differently"),
        ({"rope_parameters": {"rope_theta": 1e5}, "rope_theta": 1e4}, "rope_theta: 10000.0 and rope_parameters.rope"),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, "rope_parameters.type"),
        ({"rope_parameters": LLAMA31, "original_max_position_embeddings": 4096}, "original_max_position_embeddings: 4"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5}, "partial_rotary_factor: 0"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "dtype: .*bfloat16.* and torch_dtype: .*float16"),
    ],
)
def test_two_keys_that_state_one_fact_differently_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        architecture_from_hf({**llama_config(), **changes}, place="DIR/config.json")


def test_two_keys_that_agree_are_read_as_one_and_as_transformers_reads_them() -> None:
    from transformers import LlamaConfig

    both = {"rope_parameters": {"rope_theta": 5e5, **LLAMA31}, "rope_scaling": {"rope_theta": 5e5, **LLAMA31}}
    read = architecture_from_hf({**llama_config(), **both, "rope_theta": 5e5, "dtype": "bfloat16"})
    theirs = LlamaConfig(**{**llama_config(), **both, "rope_theta": 5e5}).rope_parameters
    assert (read.rotary_base, read.rope_scaling.factor) == (theirs["rope_theta"], theirs["factor"]) == (5e5, 8.0)


def test_architectures_of_another_family_are_said(caplog: pytest.LogCaptureFixture) -> None:
    architecture_from_hf({**llama_config(), "architectures": ["Qwen2ForCausalLM"]}, place="DIR/config.json")
    assert "Qwen2ForCausalLM" in caplog.text and "go by model_type (LlamaForCausalLM)" in caplog.text


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"mlp_bias": 1}, "mlp_bias is 1"),
        ({"hidden_act": "gelu"}, 'hidden_act: "gelu"'),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is missing"),
        ({"rope_parameters": {"type": "linear", "factor": -4.0}}, "factor is -4"),
        ({"rope_parameters": {"type": "ntk", "factor": 4.0}}, "'ntk'.*knows 'default', 'linear'"),
        ({"rope_parameters": {"type": [], "factor": 4.0}}, "of type"),
        ({"rope_parameters": {**LLAMA31, "low_freq_factor": 4.0}}, r"low_freq_factor \(4\) must be below"),
        ({"rope_parameters": {**YARN, "truncate": "no"}}, "truncate is 'no'"),
        ({"rope_parameters": {**YARN, "beta_fast": float("inf")}}, "beta_fast is inf"),
        ({"rope_parameters": {**YARN, "attention_factor": -1.0}}, "attention_factor is -1"),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}}, "long_factor is None"),
        ({"rope_parameters": {**LONG, "long_factor": [2.0] * 3}}, "long_factor has 3 numbers for 4 frequencies"),
        ({"rope_parameters": {**LONG, "long_factor": [2.0, 0.0, 2.0, 2.0]}}, "long_factor is 0.0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "for each of full_attention"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "num_query_groups"),
        ({"head_dim": 7}, r"head_dim \(7\) is odd"),
        ({"head_dim": None, "num_attention_heads": 7}, "no multiple of num_attention_heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named) as caught:
        architecture_from_hf({**llama_config(), **changes}, place="DIR/config.json")
    assert "\n" not in str(caught.value)


WINDOW = {"model_type": "mistral", "sliding_window": 4096}
SWITCHED = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
GEMMA2 = {
    "model_type": "gemma2",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
PHI3 = {"model_type": "phi3", "sliding_window": 2047}


KINDS = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 256, "rope_parameters": KINDS}
GPT_OSS = {
    "model_type": "gpt_oss",
    "sliding_window": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "rope_parameters": {"rope_theta": 150000.0, **YARN, "truncate": False},
}
MINISTRAL3 = {"model_type": "ministral3", "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}
OLMO3 = {"model_type": "olmo3", "sliding_window": 8, "rope_parameters": KINDS}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "does not say sliding_window"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({**WINDOW, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than its sliding"),
        ({**WINDOW, "num_hidden_layers": 10**9}, "1000000000 layers"),
        ({**WINDOW, "layer_types": ["full_attention"]}, "layer_types must name"),
        ({**WINDOW, "layer_types": ["sliding_attention", "chunked_attention"]}, "layer_types must name"),
        ({**WINDOW, "layer_types": [[], {}]}, "layer_types must name"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with sliding_attention"),
        ({"model_type": "qwen2", "use_sliding_window": "yes"}, 'use_sliding_window: "yes"'),
        ({**SWITCHED, "max_window_layers": None}, "max_window_layers is missing"),
        ({**SWITCHED, "max_window_layers": -1}, "max_window_layers is -1"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({**GEMMA2, "hidden_activation": "gelu"}, 'hidden_activation: "gelu"'),
        ({**GEMMA2, "use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        ({**GEMMA2, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({**GEMMA2, "attn_logit_softcapping": -50.0}, "attn_logit_softcapping is -50"),
        ({**GEMMA2, "final_logit_softcapping": "30"}, "final_logit_softcapping is '30'"),
        ({key: value for key, value in GEMMA2.items() if key != "final_logit_softcapping"}, "final_logit_softcapping"),
        ({**GEMMA2, "sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "layer_types with sliding"),
        ({"model_type": "gemma"}, "'gemma'"),
        ({"model_type": "gemma3"}, "no text_config"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        ({**GEMMA3, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({**GEMMA3, "rope_scaling": LLAMA31}, "rope_parameters and rope_scaling"),
        ({**GEMMA3, "rope_parameters": {"rope_theta": 1e6}}, "rope_parameters has rope_theta"),
        ({**GEMMA3, "rope_parameters": {"full_attention": [1e6]}}, r"rope_parameters.full_attention is \[1"),
        (
            {**GEMMA3, "rope_parameters": {"sliding_attention": YARN}},
            "scales the rotary embeddings of layers with a wi",
        ),
        ({**GEMMA3, "rope_parameters": {"full_attention": {**YARN, "truncate": False}}}, "transformers overlooks it"),
        ({**OLMO3, "rope_parameters": None, "rope_theta": 1e4}, "rope_theta 10000.0 outside of rope_parameters"),
        ({**GPT_OSS, "rope_parameters": None}, "does not say rope_parameters or rope_scaling"),
        ({**GPT_OSS, "swiglu_alpha": 1.0}, "swiglu_alpha: 1.0"),
        ({**GPT_OSS, "swiglu_limit": 0}, "swiglu_limit is 0"),
        ({**GPT_OSS, "attention_bias": False}, "attention_bias: false"),
        ({**GPT_OSS, "quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        ({**GPT_OSS, "quantization_config": "mxfp5"}, "quantized weights"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantized weights"),
        ({"model_type": "olmo3"}, "does not say sliding_window"),
        ({**MINISTRAL3, "rope_parameters": None}, "does not say rope_parameters"),
        ({**MINISTRAL3, "rope_parameters": {"rope_theta": 1e6}}, "of type None; the Megatron model .* knows 'yarn'"),
        ({**MINISTRAL3, "rope_parameters": LLAMA31}, "of type 'llama3'; the Megatron model .* knows 'yarn'"),
        ({**MINISTRAL3, "rope_parameters": YARN}, "llama_4_scaling_beta is missing"),
        ({**MINISTRAL3, "rope_parameters": {**YARN, "llama_4_scaling_beta": -0.1}}, "llama_4_scaling_beta is -0.1"),
        ({**MINISTRAL3, "rms_norm_eps": None, "head_dim": 0}, "head_dim is 0"),
        ({**WINDOW, "model_type": "ministral", "layer_types": ["full_attention"]}, "layer_types must name"),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv: 8.0"),
        ({**PHI3, "rope_parameters": {"rope_type": "longrope", "factor": 32.0}}, "short_factor is None"),
        ({**PHI3, "rope_parameters": None, "rope_scaling": {"type": "su"}}, "short_factor is None"),
        (
            {**PHI3, "rope_parameters": {**LONG, "original_max_position_embeddings": 64}},
            "where transformers takes 4096",
        ),
        ({**PHI3, "rope_parameters": YARN}, "'yarn'; the Megatron model of phi3 knows 'default', 'longrope'"),
        ({**PHI3, "rope_parameters": {"partial_rotary_factor": 0.4}}, "of 8 channels a head are 3"),
        ({**PHI3, "rope_parameters": {"partial_rotary_factor": 1.5}}, "rotary_percent 1.5"),
        ({**PHI3, "hidden_act": "gelu"}, 'hidden_act: "gelu"'),
        ({"model_type": "qwen2_moe"}, "does not say num_experts"),
        ({**MIXTURES["qwen2_moe"], "shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size is -1"),
        (
            {**MIXTURES["qwen2_moe"], "shared_expert_intermediate_size": 0},
            "moe_shared_expert_intermediate_size is None",
        ),
        ({**MIXTURES["qwen2_moe"], "qkv_bias": False}, "qkv_bias: false"),
        ({**MIXTURES["qwen3_moe"], "decoder_sparse_step": 3}, "none of the 2 layers has experts"),
        ({**MIXTURES["qwen3_moe"], "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({**MIXTURES["qwen3_moe"], "mlp_only_layers": [0, 1]}, "none of the 2 layers has experts"),
        ({**MIXTURES["qwen3_moe"], "mlp_only_layers": [0.5]}, r"mlp_only_layers is \[0.5\]"),
        ({**MIXTURES["qwen3_moe"], "mlp_only_layers": "0"}, "mlp_only_layers is '0'"),
        ({**MIXTURES["qwen3_moe"], "use_sliding_window": True}, "use_sliding_window: true"),
        ({**MIXTURES["qwen3_moe"], "shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size: 64"),
        ({**MIXTURES["qwen3_moe"], "num_experts": None}, "num_experts is missing"),
        ({**MIXTURES["qwen3_moe"], "num_local_experts": 8}, "num_experts: 4 and num_local_experts: 8"),
        ({**MIXTURES["qwen3_moe"], "num_experts_per_tok": 5}, r"moe_router_topk \(5\)"),
        ({**MIXTURES["qwen3_moe"], "num_experts_per_tok": 1}, "moe_router_topk is 1"),
        ({**MIXTURES["qwen3_moe"], "norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
        ({**MIXTURES["qwen3_moe"], "moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({**DEEPSEEK_V3, "num_key_value_heads": 2}, "num_key_value_heads: 2 and num_attention_heads: 8"),
        ({**DEEPSEEK_V3, "qk_rope_head_dim": 5}, r"qk_pos_emb_head_dim \(5\) is odd"),
        ({**DEEPSEEK_V3, "kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({**DEEPSEEK_V3, "v_head_dim": None}, "v_head_dim is missing"),
        ({**DEEPSEEK_V3, "q_lora_rank": 1.5}, "q_lora_rank is 1.5"),
        ({**DEEPSEEK_V3, "rope_interleave": "no"}, "rope_interleave is 'no'"),
        ({**DEEPSEEK_V3, "attention_bias": True}, "attention_bias: true"),
        ({**DEEPSEEK_V3, "topk_method": "greedy"}, 'topk_method: "greedy"'),
        ({**DEEPSEEK_V3, "scoring_func": "softmax"}, 'scoring_func: "softmax"'),
        ({**DEEPSEEK_V3, "moe_layer_freq": 2}, "moe_layer_freq: 2"),
        ({**DEEPSEEK_V3, "num_experts_per_tok": 3}, "judges a group by its 1 best experts"),
        ({**DEEPSEEK_V3, "n_group": 3}, r"moe_router_num_groups \(3\) must divide num_moe_experts \(8\)"),
        ({**DEEPSEEK_V3, "quantization_config": {"quant_method": "awq"}}, "quantized weights"),
        (
            {**DEEPSEEK_V3, "rope_parameters": {**YARN, "mscale_all_dim": -1.0}},
            "mscale_all_dim is -1.0",
        ),
        (
            {"model_type": "kimi_k2", "q_lora_rank": None},
            "does not say kv_lora_rank and qk_nope_head_dim and qk_rope_head_dim",
        ),
        ({**DEEPSEEK_V2, "topk_method": "noaux_tc"}, "topk_method: 'noaux_tc'"),
        ({**DEEPSEEK_V2, "norm_topk_prob": True}, "norm_topk_prob: true"),
        ({**DEEPSEEK_V2, "scoring_func": "sigmoid"}, 'scoring_func: "sigmoid"'),
        ({**DEEPSEEK_V2, "mlp_bias": True}, "mlp_bias: true"),
        ({**MIXTURES["mixtral"], "sliding_window": 4096}, "sliding_window: 4096"),
        ({**MIXTURES["mixtral"], "router_jitter_noise": 0.1}, "router_jitter_noise: 0.1"),
        ({**MIXTURES["mixtral"], "num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    ],
)
def test_what_other_families_cannot_do_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        architecture_from_hf({**llama_config(), **changes})


def test_each_family_writes_a_config_that_reads_back_and_that_transformers_reads_alike() -> None:
    transformers = pytest.importorskip("transformers")
    for family, extra in FAMILIES.items():
        read = architecture_from_hf({**llama_config(), "model_type": family, **extra})
        written = hf_from_architecture(read, dtype="float32")
        assert architecture_from_hf(written) == read
        theirs = transformers.AutoConfig.for_model(**written)
        assert (theirs.num_key_value_heads, theirs.hidden_size, theirs.tie_word_embeddings) == (4, 64, False)
        assert getattr(theirs, "head_dim", 8) in (8, None)
        assert (getattr(theirs, "sliding_window", None) or None) == read.sliding_window
        windows = [
            read.sliding_window if kind != "full_attention" else None
            for kind in getattr(theirs, "layer_types", None) or ()
        ]
        assert windows in ([], [read.window(layer) for layer in range(2)])


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    **MIXTURES,
    "gemma2": GEMMA2,
    "gpt_oss": {**GPT_OSS, "layer_types": ["full_attention", "sliding_attention"]},
    "gemma3_text": {**GEMMA3, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": {},
    "olmo3": {**OLMO3, "layer_types": ["full_attention", "sliding_attention"]},
    "phi3": PHI3,
}


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (WINDOW, [4096, 4096]),
        ({**WINDOW, "layer_types": ["sliding_attention"] * 2}, [4096, 4096]),
        (PHI3, [2047, 2047]),
        (SWITCHED, [None, 4096]),
        ({**SWITCHED, "max_window_layers": 0}, [4096, 4096]),
        ({**SWITCHED, "max_window_layers": 28}, [None, None]),
        ({**SWITCHED, "use_sliding_window": False}, [None, None]),
        ({**SWITCHED, "model_type": "qwen3"}, [None, 4096]),
        ({**SWITCHED, "layer_types": ["sliding_attention", "full_attention"]}, [4096, None]),
        (GEMMA2, [4096, None]),
        ({**GEMMA2, "layer_types": ["full_attention", "sliding_attention"]}, [None, 4096]),
        (GPT_OSS, [8, None]),
        (GEMMA3, [8, 8]),
        ({**GEMMA3, "sliding_window_pattern": 2}, [8, None]),
        ({**OLMO3, "layer_types": ["full_attention", "sliding_attention"]}, [None, 8]),
        ({**WINDOW, "model_type": "ministral"}, [4096, 4096]),
        ({**WINDOW, "model_type": "ministral", "layer_types": ["full_attention", "sliding_attention"]}, [None, 4096]),
    ],
)
def test_the_layers_with_a_window_are_those_of_transformers(changes: dict[str, Any], windows: list[int | None]) -> None:
    read = architecture_from_hf({**llama_config(), **changes})
    assert [read.window(layer) for layer in range(2)] == windows
    assert (read.sliding_window is None) == (windows == [None, None])
    assert architecture_from_hf(hf_from_architecture(read, dtype="float32")) == read


@pytest.mark.parametrize(
    ("changes", "bases"),
    [
        # As Google's and Ai2's files spell it, before transformers 5.
        (
            {**GEMMA3, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear"}},
            (1e6, 1e4),
        ),
        ({**GEMMA3}, (1e6, 1e4)),
        ({**OLMO3, "rope_theta": 5e5, "rope_scaling": YARN}, (5e5, 5e5)),
        ({**OLMO3, "rope_theta": 5e5}, (5e5, None)),
    ],
)
def test_two_kinds_of_layers_have_the_bases_of_transformers(
    changes: dict[str, Any], bases: tuple[float, float | None]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**llama_config(), **changes, "layer_types": ["sliding_attention", "full_attention"]}
    del config["rope_parameters"]
    if "rope_type" in config.get("rope_scaling", {}):
        config["rope_scaling"] = {"factor": 8.0, **config["rope_scaling"]}
    read = architecture_from_hf(config)
    assert (read.rotary_base, read.windowed_rotary_base) == bases
    theirs = transformers.AutoConfig.for_model(**config).rope_parameters
    assert theirs["full_attention"]["rope_theta"] == bases[0]
    assert theirs["sliding_attention"]["rope_theta"] == (bases[1] or bases[0])
    assert architecture_from_hf(hf_from_architecture(read, dtype="float32")) == read


def test_gemma_2_is_read_as_its_authors_wrote_it() -> None:
    """The config.json of Gemma-2-9B-It names no tie_word_embeddings; transformers ties them."""
    config = {**llama_config(), **GEMMA2, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    del config["tie_word_embeddings"]
    read = architecture_from_hf(config)
    assert read.share_embeddings_and_output_weights and read.scale_embeddings and read.layernorm_zero_centered_gamma
    assert (read.pre_layernorm, read.post_layernorm, read.activation_func) == (True, True, "gelu_tanh")
    assert (read.query_pre_attn_scalar, read.attention_softcap, read.logit_softcap) == (256, 50.0, 30.0)
    written = hf_from_architecture(read, dtype="bfloat16")
    assert isinstance(written["query_pre_attn_scalar"], int)
    assert written["hidden_activation"] == "gelu_pytorch_tanh" and "hidden_act" not in written


@pytest.mark.parametrize(("normalised", "pre_softmax"), [({"norm_topk_prob": True}, False), ({}, True)])
def test_qwen3_moe_weighs_by_the_whole_softmax_unless_it_says_otherwise(
    normalised: dict[str, Any], pre_softmax: bool
) -> None:
    config = {**llama_config(), **MIXTURES["qwen3_moe"]}
    del config["norm_topk_prob"]
    assert architecture_from_hf({**config, **normalised}).moe_router_pre_softmax is pre_softmax


def test_experts_are_read_in_either_spelling_of_their_number() -> None:
    config = {**llama_config(), **MIXTURES["qwen3_moe"]}
    read = architecture_from_hf(config)
    assert (read.num_moe_experts, read.moe_router_topk) == (4, 2)
    assert (read.moe_ffn_hidden_size, read.ffn_hidden_size) == (32, 96)
    config["num_local_experts"] = config.pop("num_experts")
    assert architecture_from_hf(config) == read


def test_mixtral_without_a_rope_base_has_transformers_default() -> None:
    transformers = pytest.importorskip("transformers")
    config = {**old_spelling(), **MIXTURES["mixtral"]}
    theirs = transformers.AutoConfig.for_model(**config)
    assert architecture_from_hf(config).rotary_base == theirs.rope_parameters["rope_theta"] == 1e6


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(ConversionError, match="quantization_config"):
        architecture_from_hf({**llama_config(), "quantization_config": {"quant_method": "fp8"}})


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00\xff"])
def test_a_damaged_config_is_one_line_with_its_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConversionError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(ConversionError, match="is not a directory"):
        read_config(tmp_path / "absent")


def test_numbers_that_json_wrote_as_floats_are_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**llama_config(), "hidden_size": 64.0}))
    assert architecture_from_hf(read_config(tmp_path)).hidden_size == 64


@pytest.mark.parametrize("config", [DEEPSEEK_V3, DEEPSEEK_V2, {**DEEPSEEK_V3, "model_type": "kimi_k2"}])
@pytest.mark.parametrize("rope", [{}, {"rope_interleave": False, "q_lora_rank": 24}])
def test_latent_attention_is_read_in_both_spellings_and_written_again(
    config: dict[str, Any], rope: dict[str, Any]
) -> None:
    scaled = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}
    new = architecture_from_hf({**llama_config(), **config, **rope, "rope_parameters": {**scaled, "rope_theta": 1e4}})
    old = {**scaled, "type": scaled["rope_type"]}
    del old["rope_type"]
    assert architecture_from_hf({**old_spelling(), **config, **rope, "rope_theta": 1e4, "rope_scaling": old}) == new
    assert architecture_from_hf(hf_from_architecture(new, dtype="float32")) == new
    # (0.1 mscale_all_dim log(factor) + 1)^2 / sqrt(channels of a query's head), as yarn_apply_mscale of transformers.
    assert new.latent_softmax_scale == pytest.approx((0.05 * math.log(4.0) + 1) ** 2 / 12**0.5, rel=1e-12)
