"""A tiny random model of every family, made and written by transformers itself: the truth that the tables answer to.

Awkward on purpose: heads wider than hidden_size / heads, 263 tokens (no multiple of 128), three layers, windows of
eight tokens, soft caps that bite. `KEY_VALUE_HEADS` says for which tensor-parallel sizes a model is.
"""

import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sppo.checkpoints.pretrained import load_pretrained
from tests.models import byte_tokenizer

NUM_LAYERS = 3
VOCAB_SIZE = 263
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA_32 = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
# Half of each head is rotated; prompts of 24 tokens and less are short.
LONGROPE = {
    "head_dim": 12,
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_theta": 1e4,
        "rope_type": "longrope",
        "partial_rotary_factor": 0.5,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [1.5, 2.5, 4.0],
        "original_max_position_embeddings": 24,
    },
}
EXPERTS = {"num_experts_per_tok": 2}
# Two value heads for each of four key heads, which context-parallel ranks divide as well.
DELTA_NET = {
    "head_dim": 24,  # a quarter of it is rotated
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    # What a head reads may be next to nothing, of which the default's 1e-6 makes a vector of noise.
    "rms_norm_eps": 0.1,
}
# Heads of queries and keys (10 and 6 rotated channels) and of values are of other widths than hidden_size / heads.
LATENTS = {
    "num_key_value_heads": 4,
    "head_dim": 6,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, scaled rope": {"model_type": "llama", "rope_parameters": LLAMA_32, "max_position_embeddings": 131072},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": 8},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **EXPERTS},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        **EXPERTS,
    },
    "qwen3_moe, dense between": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        **EXPERTS,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        **EXPERTS,
    },
    "qwen2_moe, dense between": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
        **EXPERTS,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        **DELTA_NET,
        **EXPERTS,
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text",
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        **DELTA_NET,
    },
    "qwen3_5_moe_text": {
        "model_type": "qwen3_5_moe_text",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "full_attention_interval": 2,
        **DELTA_NET,
        **EXPERTS,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
        **EXPERTS,
    },
    "glm4_moe, biases, groups, two shared": {
        "model_type": "glm4_moe",
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "attention_bias": True,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {"model_type": "deepseek_v2", "q_lora_rank": None, "first_k_dense_replace": 1, **LATENTS, **EXPERTS},
    "deepseek_v2, groups, all layers sparse": {
        "model_type": "deepseek_v2",
        "q_lora_rank": 20,
        **LATENTS,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 3.0,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "q_lora_rank": 20,
        **LATENTS,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v3, halves, no groups": {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "rope_interleave": False,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        **LATENTS,
        **EXPERTS,
    },
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 8,
        "query_pre_attn_scalar": 28,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "query_pre_attn_scalar": 28,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "sliding_window": 8,
        "num_local_experts": 4,
        "rope_parameters": {**YARN, "truncate": False},
        # Near enough for the clamps to bite.
        "swiglu_limit": 1.0,
        **EXPERTS,
    },
    "ministral": {
        "model_type": "ministral",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral3": {
        "model_type": "ministral3",
        # Sequences are longer than the original length: queries behind it grow.
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
    },
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {"model_type": "phi3", "sliding_window": 8},
    "phi3, longrope of a half": {"model_type": "phi3", **LONGROPE},
    "qwen3, yarn": {"model_type": "qwen3", "rope_parameters": YARN},
}
MIXTURES = tuple(name for name, settings in FAMILIES.items() if "num_experts_per_tok" in settings)
"""Those with experts."""
BIASED_EXPERTS = ("gpt_oss",)
"""Those whose experts have biases."""


@dataclass(frozen=True)
class InEngine:
    """How vLLM on a CPU is to compute a family."""

    changes: dict[str, Any] = field(default_factory=dict)
    """Of the model's settings, beside ENGINE_SHAPE."""
    dtype: str = "float32"
    refusal: str = ""
    """Words of vLLM's own, where it takes no such model."""


# Sizes that vLLM's CPU kernels are made for, of the settings that a family has.
ENGINE_SHAPE = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
WIDE_LONGROPE = LONGROPE["rope_parameters"] | {
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8],
    "long_factor": [1.5, 2.0, 2.5, 3.0, 3.2, 3.4, 3.6, 4.0],
}
# Published configs have these keys; transformers' own classes know none of them, and do not write them.
PUBLISHED_V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
SMALL_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
NO_TORCHVISION = "failed to be inspected"
IN_ENGINE: dict[str, InEngine] = {
    "qwen2, window": InEngine(refusal="Sliding window for some but all layers is not supported"),
    "qwen2_moe, dense between": InEngine({"sliding_window": 128}),
    "qwen3_next": InEngine(dtype="bfloat16"),
    "qwen3_5_text": InEngine(refusal=NO_TORCHVISION),
    "qwen3_5_moe_text": InEngine(refusal=NO_TORCHVISION),
    "deepseek_v2": InEngine(
        {"head_dim": 64, "rope_parameters": SMALL_YARN, "n_group": 1, "topk_group": 1}, dtype="bfloat16"
    ),
    "deepseek_v2, groups, all layers sparse": InEngine({"head_dim": 64}, dtype="bfloat16"),
    "deepseek_v3": InEngine({"head_dim": 64, **PUBLISHED_V3}, dtype="bfloat16"),
    "deepseek_v3, halves, no groups": InEngine(
        {"head_dim": 64, **PUBLISHED_V3, "rope_parameters": SMALL_YARN, "rope_interleave": True}, dtype="bfloat16"
    ),
    "gpt_oss": InEngine({"swiglu_limit": 7.0, "rope_parameters": {**YARN, "truncate": False, "beta_slow": 1.0}}),
    "ministral3": InEngine(
        {"rope_parameters": FAMILIES["ministral3"]["rope_parameters"] | {"original_max_position_embeddings": 128}}
    ),
    "phi3, longrope of a half": InEngine(
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": WIDE_LONGROPE | {"original_max_position_embeddings": 128},
        }
    ),
}
"""Of the others the models are taken as they are."""
OTHERWISE_IN_ENGINE: dict[str, tuple[str, InEngine]] = {
    "windows of some layers": ("qwen2_moe, dense between", InEngine()),
    "long factors for all": ("phi3, longrope of a half", InEngine({"rope_parameters": WIDE_LONGROPE})),
    "queries that grow": ("ministral3", InEngine()),
    "another clamp": ("gpt_oss", InEngine(IN_ENGINE["gpt_oss"].changes | {"swiglu_limit": 1.0})),
    "windows elsewhere": (
        "gpt_oss",
        InEngine(IN_ENGINE["gpt_oss"].changes | {"layer_types": ["full_attention"] * NUM_LAYERS}),
    ),
    "halves": (
        "deepseek_v3, halves, no groups",
        InEngine({"head_dim": 64, **PUBLISHED_V3, "rope_parameters": SMALL_YARN}, dtype="bfloat16"),
    ),
    "no YaRN": ("deepseek_v2", InEngine({"head_dim": 64, "n_group": 1, "topk_group": 1}, dtype="bfloat16")),
    "no scores": ("deepseek_v3", InEngine({"head_dim": 64, "topk_method": "noaux_tc"}, dtype="bfloat16")),
}
"""Models of which vLLM computes something else, and says nothing (rollout/engine_differences.py)."""


def family_model(directory: Path, name: str, **overrides: Any) -> Path:
    """Write a random model of `FAMILIES[name]`, with the byte tokenizer -> the directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**COMMON, **FAMILIES[name], **overrides}
    if "kv_lora_rank" in settings:  # latent attention has a key for each query head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    config = AutoConfig.for_model(**settings)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for parameter_name, parameter in (*model.named_parameters(), *(("bias", bias) for bias in biases)):
            # Norms are vectors around what they begin with, 0 or 1. Matrices keep the size of what they multiply, so
            # that scores and logits are of the order of the caps.
            noise = torch.randn(parameter.shape, generator=generator)
            inputs = parameter.shape[-1] if parameter_name.endswith("conv1d.weight") else settings["hidden_size"]
            scale = inputs**-0.5
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else scale * noise)
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


def engine_model(directory: Path, name: str, engine: InEngine) -> Path:
    """Write a random model of `FAMILIES[name]` for vLLM on a CPU -> the directory."""
    known = {**COMMON, **FAMILIES[name]}
    shape = {key: value for key, value in ENGINE_SHAPE.items() if key in known}
    return family_model(directory, name, **shape | engine.changes)


def token_ids(num_prompts: int = 3, length: int = 40) -> torch.Tensor:
    """Draw prompts that are longer than any window above -> [num_prompts, length]."""
    return torch.randint(VOCAB_SIZE, (num_prompts, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hugging_face_logits(hf: Path, tokens: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Run Hugging Face's own model with its eager attention -> [B, S, V]."""
    from transformers import AutoModelForCausalLM

    model = load_pretrained(AutoModelForCausalLM, hf, dtype=dtype, attn_implementation="eager").eval()
    logits: torch.Tensor = model(input_ids=tokens).logits
    return logits
