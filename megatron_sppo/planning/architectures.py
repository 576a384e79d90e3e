"""Shapes of published models, so that a plan needs no files of theirs. Only what a plan reads is meant to be right."""

from pathlib import Path
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.errors import ConfigError
from megatron_sppo.layer_parts import DeltaNet, LatentAttention, RopeScaling


def _shape(
    family: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, head: int, vocab: int, **rest: Any
) -> Architecture:
    values: dict[str, Any] = {
        "max_position_embeddings": 8192,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 500000.0,
        "share_embeddings_and_output_weights": False,
        **family_of(family, place=__name__).traits,
    }
    return Architecture(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=vocab,
        **(values | rest),
    )


def _delta_net(layers: int, *, value_heads: int) -> DeltaNet:
    """Describe Qwen's gated delta nets, in three of four layers."""
    return DeltaNet(
        linear_attention_freq=tuple(int((layer + 1) % 4 != 0) for layer in range(layers)),
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
    )


def _deepseek(
    family: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    vocab: int,
    *,
    q_rank: int | None,
    width: int,
    dense: int,
    shared: int,
    factor: float,
    **rest: Any,
) -> Architecture:
    """Describe a model with latent attention, by the widths of an expert, of all shared ones and of dense layers."""
    latent = LatentAttention(
        q_lora_rank=q_rank,
        kv_lora_rank=512,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
        mscale_all_dim=1.0,
    )
    scaling = RopeScaling(
        rope_type="yarn", factor=factor, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=4096
    )
    return _shape(
        family,
        layers,
        hidden,
        ffn,
        heads,
        heads,
        latent.query_head_dim,
        vocab,
        latent_attention=latent,
        rope_scaling=scaling,
        rotary_base=1e4,
        moe_ffn_hidden_size=width,
        moe_shared_expert_intermediate_size=shared,
        moe_layer_freq=dense * (0,) + (layers - dense) * (1,),
        max_position_embeddings=int(4096 * factor),
        **rest,
    )


_QWEN_NEXT = {"max_position_embeddings": 262144, "rotary_base": 1e7, "rotary_percent": 0.25}
_TIED = {"share_embeddings_and_output_weights": True}
_QWEN2 = {"max_position_embeddings": 32768}
_LONG = {"max_position_embeddings": 65536}
_GPT_OSS: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "rotary_base": 150000.0,
    "rope_scaling": RopeScaling(
        rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=4096, attention_factor=1.3465735902799727,
    ),
    "sliding_window": 128,
    "activation_func_clamp_value": 7.0,
    "moe_router_topk": 4,
    "moe_ffn_hidden_size": 2880,
}  # fmt: skip
_GEMMA2 = {"attention_softcap": 50.0, "logit_softcap": 30.0, "sliding_window": 4096}

PUBLISHED: dict[str, Architecture] = {
    "smollm2-135m": _shape("llama", 30, 576, 1536, 9, 3, 64, 49152, **_TIED),
    "llama3.2-1b": _shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, max_position_embeddings=131072, **_TIED),
    "llama3.2-3b": _shape("llama", 28, 3072, 8192, 24, 8, 128, 128256, max_position_embeddings=131072, **_TIED),
    "llama3-8b": _shape("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "llama3-70b": _shape("llama", 80, 8192, 28672, 64, 8, 128, 128256),
    "mistral-7b": _shape("mistral", 32, 4096, 14336, 32, 8, 128, 32000, max_position_embeddings=32768),
    "gemma-2-9b": _shape("gemma2", 42, 3584, 14336, 16, 8, 256, 256000, **_TIED, **_GEMMA2),
    "gemma-3-1b": _shape(
        "gemma3_text", 26, 1152, 6912, 4, 1, 256, 262144, **_TIED, max_position_embeddings=32768, rotary_base=1e6,
        windowed_rotary_base=1e4, query_pre_attn_scalar=256, sliding_window=512,
        full_attention_layers=tuple(range(5, 26, 6)),
    ),
    "olmo-3-7b": _shape(
        "olmo3", 32, 4096, 11008, 32, 32, 128, 100278, **_LONG, sliding_window=4096,
        full_attention_layers=tuple(range(3, 32, 4)),
    ),
    "olmo-3-32b": _shape(
        "olmo3", 64, 5120, 27648, 40, 8, 128, 100278, **_LONG, sliding_window=4096,
        full_attention_layers=tuple(range(3, 64, 4)),
    ),
    "mistral-small-24b": _shape("mistral", 40, 5120, 32768, 32, 8, 128, 131072, max_position_embeddings=32768),
    "qwen2.5-7b": _shape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, **_QWEN2),
    "qwen2.5-72b": _shape("qwen2", 80, 8192, 29568, 64, 8, 128, 152064, **_QWEN2),
    "qwen3-8b": _shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, max_position_embeddings=40960),
    "mixtral-8x7b": _shape(
        "mixtral", 32, 4096, 14336, 32, 8, 128, 32000, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=14336
    ),
    "gpt-oss-20b": _shape(
        "gpt_oss", 24, 2880, 2880, 64, 8, 64, 201088, **_GPT_OSS, num_moe_experts=32,
        full_attention_layers=tuple(range(1, 24, 2)),
    ),
    "gpt-oss-120b": _shape(
        "gpt_oss", 36, 2880, 2880, 64, 8, 64, 201088, **_GPT_OSS, num_moe_experts=128,
        full_attention_layers=tuple(range(1, 36, 2)),
    ),
    "qwen3-30b-a3b": _shape(
        "qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936,
        num_moe_experts=128, moe_router_topk=8, moe_ffn_hidden_size=768,
    ),
    "qwen3-235b-a22b": _shape(
        "qwen3_moe", 94, 4096, 12288, 64, 4, 128, 151936,
        num_moe_experts=128, moe_router_topk=8, moe_ffn_hidden_size=1536, max_position_embeddings=40960,
    ),
    "qwen1.5-moe-a2.7b": _shape(
        "qwen2_moe", 24, 2048, 5632, 16, 16, 128, 151936, num_moe_experts=60, moe_router_topk=4,
        moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=5632, moe_router_pre_softmax=True,
    ),
    "qwen2-57b-a14b": _shape(
        "qwen2_moe", 28, 3584, 18944, 28, 4, 128, 151936, num_moe_experts=64, moe_router_topk=8,
        moe_ffn_hidden_size=2560, moe_shared_expert_intermediate_size=20480, moe_router_pre_softmax=True,
    ),
    "qwen3.6-27b": _shape(
        "qwen3_5_text", 64, 5120, 17408, 24, 4, 256, 248320, **_QWEN_NEXT, delta_net=_delta_net(64, value_heads=48),
    ),
    "qwen3-next-80b-a3b": _shape(
        "qwen3_next", 48, 2048, 5120, 16, 2, 256, 151936, **_QWEN_NEXT, delta_net=_delta_net(48, value_heads=32),
        num_moe_experts=512, moe_router_topk=10, moe_ffn_hidden_size=512, moe_shared_expert_intermediate_size=512,
    ),
    "glm-4.5-air": _shape(
        "glm4_moe", 46, 4096, 10944, 96, 8, 128, 151552, num_moe_experts=128, moe_router_topk=8,
        moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=1408, moe_layer_freq=(0,) + 45 * (1,),
        add_qkv_bias=True, rotary_percent=0.5, max_position_embeddings=131072,
    ),
    "glm-4.5": _shape(
        "glm4_moe", 92, 5120, 12288, 96, 8, 128, 151552, num_moe_experts=160, moe_router_topk=8,
        moe_ffn_hidden_size=1536, moe_shared_expert_intermediate_size=1536, moe_layer_freq=(0, 0, 0) + 89 * (1,),
        moe_router_topk_scaling_factor=2.5, add_qkv_bias=True, qk_layernorm=True, rotary_percent=0.5,
        max_position_embeddings=131072,
    ),
    "deepseek-v2-lite": _deepseek(
        "deepseek_v2", 27, 2048, 10944, 16, 102400, q_rank=None, width=1408, dense=1, shared=2816, factor=40.0,
        num_moe_experts=64, moe_router_topk=6, moe_router_pre_softmax=True,
    ),
    "deepseek-v2": _deepseek(
        "deepseek_v2", 60, 5120, 12288, 128, 102400, q_rank=1536, width=1536, dense=1, shared=3072, factor=40.0,
        num_moe_experts=160, moe_router_topk=6, moe_router_pre_softmax=True, moe_router_topk_scaling_factor=16.0,
        moe_router_num_groups=8, moe_router_group_topk=3,
    ),
    "deepseek-v3": _deepseek(
        "deepseek_v3", 61, 7168, 18432, 128, 129280, q_rank=1536, width=2048, dense=3, shared=2048, factor=40.0,
        num_moe_experts=256, moe_router_topk=8, moe_router_topk_scaling_factor=2.5,
        moe_router_num_groups=8, moe_router_group_topk=4,
    ),
    "kimi-k2": _deepseek(
        "kimi_k2", 61, 7168, 18432, 64, 163840, q_rank=1536, width=2048, dense=1, shared=2048, factor=32.0,
        num_moe_experts=384, moe_router_topk=8, moe_router_topk_scaling_factor=2.827,
    ),
}  # fmt: skip
"""By name. Number of weights as published: tests/unit/planning/test_parameters.py."""


def find_architecture(model: str | None, *, config_file: Path | None) -> tuple[str, Architecture]:
    """Find what is to be planned -> (how it was named, architecture).

    Args:
        model: a Hugging Face directory (its config.json is enough), or a name of `PUBLISHED`.
        config_file: without `model`, the published model that the file's name begins with: llama3_70b_h100.yaml.

    Raises:
        ConfigError: neither says which model.
        ConversionError: the directory's config.json is not one that can be converted.
    """
    if model is not None and Path(model).is_dir():
        return model, architecture_from_hf(read_config(Path(model)))
    if model is not None:
        if model not in PUBLISHED:
            raise ConfigError(f"{model} is no directory and no built-in model. Use one of: {', '.join(PUBLISHED)}.")
        return model, PUBLISHED[model]
    begins = _bare(config_file.stem) if config_file is not None else ""
    fitting = [name for name in PUBLISHED if begins.startswith(_bare(name))]
    if not fitting:
        raise ConfigError(
            f"no model is named. Use --model with a Hugging Face directory or one of: {', '.join(PUBLISHED)}."
        )
    name = max(fitting, key=len)
    return f"{name} (by the name of {config_file})", PUBLISHED[name]


def _bare(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
