"""A PairRM with random weights, on disk in both checkpoint formats: tiny for tests, of any size for benchmarks."""

import json
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
TEXT = """
the a of and to in it is that for on are with as this be at from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made
over did down only way find use may water long little very after words called just where most know get
through back much go good new write our me man too any day same right look think also around another came
come work three word must because
"""
WORDS = TEXT.split()


def make_tokenizer(directory: Path) -> None:
    """Write a DeBERTa-v2 tokenizer: SentencePiece with byte fallback, [PAD] [CLS] [SEP] [UNK] first."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    lines = [
        " ".join(WORDS[index] for index in torch.randint(len(WORDS), (20,), generator=generator).tolist())
        for _ in range(400)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(directory / "spm"), vocab_size=520, model_type="unigram",
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
        unk_piece="[UNK]", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    config = {"do_lower_case": False, "vocab_type": "spm", "tokenizer_class": "DebertaV2Tokenizer"}
    Path(directory, "tokenizer_config.json").write_text(json.dumps(config))
    Path(directory, "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))


def make_tiny_pairrm(
    root: Path, *, hidden_size: int = 64, num_layers: int = 2, num_heads: int = 4, ffn_multiple: int = 2
) -> tuple[Path, Path]:
    """Write base/, PairRM/ (native) and PairRM-hf/ under `root`, the same weights in both -> (native, hf)."""
    base, native, hf = root / "base", root / "PairRM", root / "PairRM-hf"
    make_tokenizer(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=num_heads,
        intermediate_size=ffn_multiple * hidden_size, max_position_embeddings=512, type_vocab_size=0,
        layer_norm_eps=1e-7, relative_attention=True, max_relative_positions=-1, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    DebertaV2Model(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tokenizer.add_tokens(list(MARKERS))
    config.vocab_size = len(tokenizer)
    torch.manual_seed(1)
    encoder = DebertaV2Model(config)
    tensors = {f"pretrained_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    # Attention of a freshly initialised model hardly looks at the text: larger weights make every token count.
    for name, tensor in tensors.items():
        if name.endswith("weight") and tensor.ndim == 2:
            tensors[name] = tensor * 4 * (64 / hidden_size) ** 0.5
    for name, shape in (("1", (hidden_size, 2 * hidden_size)), ("4", (1, hidden_size))):
        tensors[f"head_layer.{name}.weight"] = torch.randn(shape) * 0.2
        tensors[f"head_layer.{name}.bias"] = torch.randn(shape[0]) * 0.2
    _write_native(native, base, tensors)
    _write_hf(hf, config, tokenizer, tensors)
    return native, hf


def _write_native(directory: Path, base: Path, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    ranker = {
        "ranker_type": "pairranker", "model_type": "deberta", "model_name": str(base), "cache_dir": None,
        "load_checkpoint": None, "source_maxlength": 1224, "candidate_maxlength": 412, "n_tasks": 1, "num_pos": 5,
        "num_neg": 5, "sub_sampling_mode": "all_pair", "sub_sampling_ratio": 0.4, "loss_type": "instructgpt",
        "reduce_type": "linear", "inference_mode": "bubble", "drop_out": 0.05, "fp16": True,
    }  # fmt: skip
    Path(directory, "config.json").write_text(json.dumps(ranker))


def _write_hf(directory: Path, config: DebertaV2Config, tokenizer, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    ids = tokenizer.convert_tokens_to_ids(list(MARKERS))
    content = config.to_dict() | {
        "n_tasks": 1, "drop_out": 0.05, "sep_token_id": tokenizer.sep_token_id, "source_prefix_id": ids[0],
        "cand1_prefix_id": ids[1], "cand2_prefix_id": ids[2], "cand_prefix_id": ids[3],
    }  # fmt: skip
    Path(directory, "config.json").write_text(json.dumps(content, default=str))
    tokenizer.save_pretrained(directory)
