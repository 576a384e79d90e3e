"""Tiny Hugging Face models for tests: real files, random weights, a real tokenizer with a chat template.

Written without transformers, so that a test can have a model in milliseconds and in any environment.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_sppo.checkpoints.tokenizer import ID_FILES, TEXT_FILES

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIXTURE_KEYS = {
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "qkv_bias",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "router_aux_loss_coef",
    "n_routed_experts",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
    "use_qk_norm",
}
MIXTURES: dict[str, dict[str, Any]] = {
    # Four experts of 32 channels, two for each token; keys as the hub's config.json spell them.
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 1,
    },
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "sliding_window": None,
    },
}
"""Config overrides that make `tiny_llama` a mixture of experts."""
BYTE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes and three ChatML tokens (ids 0, 1, 2), and a chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def llama_config(**overrides: Any) -> dict[str, Any]:
    """Make config.json of a small Llama: 2 layers, hidden size 64, 8 heads over 4 key/value heads, untied."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": BYTE_VOCAB_SIZE,
    }
    unused = (
        set(overrides)
        - set(values)
        - {"rope_theta", "rope_scaling", "torch_dtype", "sliding_window", "use_sliding_window"}
        - MIXTURE_KEYS
    )
    assert not unused, f"config.json of a Llama has no {sorted(unused)}"
    return {**values, **overrides}


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """List the tensors of a checkpoint of Llama's kind -> {Hugging Face name: shape}, in checkpoint order."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            **feed_forward_shapes(config, prefix, dense=layer < config.get("first_k_dense_replace", 0)),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.k_proj.weight": (keys, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, queries),
            prefix + "self_attn.q_proj.weight": (queries, hidden),
            prefix + "self_attn.v_proj.weight": (keys, hidden),
        }
        if config["model_type"] in ("qwen2", "qwen2_moe"):
            shapes |= {prefix + f"self_attn.{x}_proj.bias": (keys if x in "kv" else queries,) for x in "kqv"}
        if config["model_type"] in ("qwen3", "qwen3_moe") or config.get("use_qk_norm"):
            shapes |= {prefix + f"self_attn.{x}_norm.weight": (head,) for x in "kq"}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def feed_forward_shapes(config: dict[str, Any], prefix: str, *, dense: bool = False) -> dict[str, tuple[int, ...]]:
    """List the tensors of one layer's feed-forward unit, or of its experts, by the names that the hub's files use."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    if config["model_type"] in ("qwen2_moe", "qwen3_moe", "glm4_moe") and not dense:
        count, width = config.get("num_experts") or config["n_routed_experts"], config["moe_intermediate_size"]
        block, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    elif config["model_type"] == "mixtral":
        count, width = config["num_local_experts"], ffn
        block, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    else:
        return {
            prefix + "mlp.down_proj.weight": (hidden, ffn),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
        }
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{block}.gate.weight": (count, hidden)}
    if config["model_type"] == "qwen2_moe":
        shapes |= shared_expert_shapes(f"{prefix}mlp.shared_expert", hidden, config["shared_expert_intermediate_size"])
        shapes[f"{prefix}mlp.shared_expert_gate.weight"] = (1, hidden)
    if config["model_type"] == "glm4_moe":
        shapes |= shared_expert_shapes(f"{prefix}mlp.shared_experts", hidden, config["n_shared_experts"] * width)
        shapes[f"{prefix}mlp.gate.e_score_correction_bias"] = (count,)
    for expert in range(count):
        name = f"{prefix}{block}.experts.{expert}"
        shapes |= {
            f"{name}.{down}.weight": (hidden, width),
            f"{name}.{gate}.weight": (width, hidden),
            f"{name}.{up}.weight": (width, hidden),
        }
    return shapes


def shared_expert_shapes(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """List the tensors of a shared expert."""
    return {
        f"{name}.down_proj.weight": (hidden, width),
        f"{name}.gate_proj.weight": (width, hidden),
        f"{name}.up_proj.weight": (width, hidden),
    }


def random_weights(
    shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype, seed: int, scale: float
) -> dict[str, torch.Tensor]:
    """Draw normal weights of standard deviation `scale`; norm weights lie around 1 instead -> {name: tensor}."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator) * scale
        kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype  # as transformers keeps it
        weights[name] = (noise + 1.0 if name.endswith("norm.weight") else noise).to(kept)
    return weights


def tiny_llama(
    directory: Path, *, tokenizer_dir: Path | None = None, seed: int = 0, scale: float = 0.05, **overrides: Any
) -> Path:
    """Write a random Llama as a Hugging Face directory -> the directory.

    Args:
        tokenizer_dir: whose tokenizer files to copy; without it the byte tokenizer (259 tokens) is written.
        seed: of the weights.
        scale: standard deviation of the weights.
        overrides: fields of config.json, such as `num_key_value_heads=1` or `dtype="bfloat16"`; `model_type="qwen2"`
            or "qwen3" adds the tensors of those families, `**MIXTURES["mixtral"]` puts experts in every layer.
    """
    directory = Path(directory)
    config = llama_config(**overrides)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir is None:
        byte_tokenizer(directory)
    else:
        for name in (*ID_FILES, *TEXT_FILES):
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, directory / name)
    weights = random_weights(llama_shapes(config), dtype=getattr(torch, config["dtype"]), seed=seed, scale=scale)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return directory
