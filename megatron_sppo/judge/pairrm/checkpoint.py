"""PairRM's network over transformers' DeBERTa-v2, and its two checkpoint formats. llm-blender is not needed.

Both formats hold the same tensors: `pretrained_model.*` (DeBERTa-v2) and `head_layer.1`, `head_layer.4`.
- native (llm-blender/PairRM): config.json is llm-blender's RankerConfig; DeBERTa's own config and tokenizer come from
  its `model_name`, and four marker tokens are added to that tokenizer.
- HF (llm-blender/PairRM-hf): config.json is DeBERTa's, with the marker ids in it; the tokenizer lies beside it.

# P = pairs, H = hidden size
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, PreTrainedTokenizerBase

from megatron_sppo.checkpoints.file_digests import sha256_of_files
from megatron_sppo.checkpoints.pretrained import UNUSABLE
from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import read_json, sha256_of_json
from megatron_sppo.judge.model_files import load_tokenizer, local_directory
from megatron_sppo.judge.pairrm.deberta import MarkerEncoder, check_config
from megatron_sppo.storage import damage

logger = logging.getLogger(__name__)

SOURCE_MARKER, FIRST_MARKER, SECOND_MARKER = "<|source|>", "<|candidate1|>", "<|candidate2|>"
MARKERS = (SOURCE_MARKER, FIRST_MARKER, SECOND_MARKER, "<|candidate|>")
"""In llm-blender's order: native checkpoints number their embedding rows by it."""

HEAD_ROWS = 64
_LEAST_TOKENS = 4
"""[CLS], the marker, [SEP] and a token of text."""
_DEFAULT_SOURCE_LENGTH, _DEFAULT_CANDIDATE_LENGTH = 1224, 412
_FILES = ("*.json", "*.safetensors", "spm.model", "tokenizer.model")
_TOKENIZER_FILES = ("*.json", "spm.model", "tokenizer.model")
# A buffer in older transformers, no weight: checkpoints written by them hold it.
_IGNORED_TENSORS = frozenset({"pretrained_model.embeddings.position_ids"})


class PairRMNetwork(nn.Module):
    """DeBERTa-v2 and a two-layer head on the marker positions: score(source, first) - score(source, second)."""

    def __init__(self, config: DebertaV2Config, *, num_tasks: int) -> None:
        super().__init__()
        self.pretrained_model: Any = DebertaV2Model(config)
        # Places 0 and 3 are dropouts in training; with them the checkpoint's names are head_layer.1 and head_layer.4.
        self.head_layer = nn.Sequential(
            nn.Identity(),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Identity(),
            nn.Linear(config.hidden_size, num_tasks),
        )

    def logits(self, marker_states_P3H: Tensor) -> Tensor:
        """Compare the candidates -> [P] float32 logits of "the first beats the second".

        In float32 whatever the encoder's precision: it ends in a difference of two near numbers. Always in blocks of
        HEAD_ROWS rows: BLAS takes another kernel for a handful of rows, and a pair's logit would then depend, in its
        last bit, on how many neighbours it has.
        """
        num_pairs = len(marker_states_P3H)
        states = torch.cat(
            [marker_states_P3H, marker_states_P3H.new_zeros(-num_pairs % HEAD_ROWS, *marker_states_P3H.shape[1:])]
        )
        blocks = []
        for block in states.view(len(states) // HEAD_ROWS, HEAD_ROWS, *states.shape[1:]):
            source, first, second = block.unbind(dim=1)
            first_score = self.head_layer(torch.cat([source, first], dim=-1))
            second_score = self.head_layer(torch.cat([source, second], dim=-1))
            blocks.append((first_score - second_score).mean(dim=-1))
        return torch.cat(blocks)[:num_pairs]


@dataclass(frozen=True, kw_only=True)
class PairRMCheckpoint:
    """A loaded PairRM."""

    network: PairRMNetwork
    encoder: MarkerEncoder
    """Reads the network's DeBERTa at the markers."""
    tokenizer: PreTrainedTokenizerBase
    source_length: int
    """Tokens of the source at most, [CLS], marker and [SEP] included."""
    candidate_length: int
    """Tokens of a candidate at most beside a source of full length; a shorter source leaves it more."""
    fingerprint: str
    """Hash of the files that decide the logits."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Where a checkpoint's files are."""

    directory: Path
    base: Path
    """Of DeBERTa's own config and tokenizer."""
    content: dict[str, Any]
    """config.json's."""

    @property
    def is_native(self) -> bool:
        """llm-blender's own format, not transformers'."""
        return "ranker_type" in self.content

    def fingerprint(self) -> str:
        """Hash the files that decide the logits -> 64 hex digits."""
        deciding = {path.name: path for path in sorted(self.directory.iterdir()) if _decides(path)}
        if self.is_native:
            deciding |= {f"base/{path.name}": path for path in sorted(self.base.iterdir()) if _decides_ids(path)}
        return sha256_of_json(dict(zip(deciding, sha256_of_files(list(deciding.values())), strict=True)))


def _find(name: str) -> _Found:
    directory = local_directory(name, spec="pairrm", patterns=_FILES)
    content = read_json(directory / "config.json")
    if not isinstance(content, dict):
        raise ConfigError(f"{directory / 'config.json'} is no JSON object. Give the directory of a PairRM checkpoint.")
    base = _base_directory(content, directory) if "ranker_type" in content else directory
    return _Found(directory=directory, base=base, content=content)


def pairrm_fingerprint(name: str) -> str:
    """Hash the files that decide the logits, none of them loaded -> 64 hex digits.

    Raises:
        ConfigError: no such checkpoint here or on the hub.
    """
    return _find(name).fingerprint()


def load_pairrm(name: str, *, dtype: torch.dtype, device: torch.device) -> PairRMCheckpoint:
    """Load PairRM from a directory or a hub id, whichever format it has -> PairRMCheckpoint, in eval mode.

    Raises:
        ConfigError: no such checkpoint here or on the hub, or its files do not make a PairRM.
    """
    found = _find(name)
    directory, base, content, native = found.directory, found.base, found.content, found.is_native
    tokenizer = load_tokenizer(base, remedy="Download it again.")
    if native:
        tokenizer.add_tokens(list(MARKERS))
    _check_markers(tokenizer, content, directory, native=native)
    tensors = _load_tensors(directory)
    config = _deberta_config(base)
    check_config(config)
    config.vocab_size = _embedding_rows(tensors, tokenizer, directory)
    network = PairRMNetwork(config, num_tasks=_number(content, "n_tasks", 1, directory))
    _fill(network, tensors, directory)
    network.pretrained_model.to(dtype)
    network.head_layer.float()
    network.to(device).eval().requires_grad_(False)
    return PairRMCheckpoint(
        network=network,
        encoder=MarkerEncoder(network.pretrained_model),
        tokenizer=tokenizer,
        source_length=_number(content, "source_maxlength", _DEFAULT_SOURCE_LENGTH, directory, low=_LEAST_TOKENS),
        candidate_length=_number(
            content, "candidate_maxlength", _DEFAULT_CANDIDATE_LENGTH, directory, low=_LEAST_TOKENS
        ),
        fingerprint=found.fingerprint(),
    )


def _number(content: dict[str, Any], name: str, default: int, directory: Path, *, low: int = 1) -> int:
    """Read a number of config.json -> int, the default where it is null or absent."""
    value = content.get(name)
    if value is None:
        return default
    if type(value) is not int or value < low:
        raise ConfigError(
            f"{directory / 'config.json'} says {name} {value!r}, which must be a whole number from {low} on. "
            f"llm-blender/PairRM has {default}."
        )
    return value


def _deberta_config(base: Path) -> DebertaV2Config:
    try:
        return DebertaV2Config.from_pretrained(base)
    except (OSError, ValueError, *UNUSABLE) as error:
        raise ConfigError(
            f"{base / 'config.json'} is no config of DeBERTa-v2 ({one_line(error)}). Download it again."
        ) from None


def _decides(path: Path) -> bool:
    return path.suffix == ".safetensors" or _decides_ids(path)


def _decides_ids(path: Path) -> bool:
    return path.is_file() and path.suffix in (".json", ".model")


def _base_directory(content: dict[str, Any], directory: Path) -> Path:
    """Find DeBERTa's own config and tokenizer for a native checkpoint."""
    if content["ranker_type"] != "pairranker":
        raise ConfigError(
            f"{directory} is a {content['ranker_type']!r} of llm-blender, not a PairRM. "
            "Use --judge pairrm:llm-blender/PairRM."
        )
    if not isinstance(content.get("model_name"), str):
        raise ConfigError(f"{directory / 'config.json'} has no model_name. Download the checkpoint again.")
    return local_directory(content["model_name"], spec="pairrm", patterns=_TOKENIZER_FILES)


def _check_markers(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], directory: Path, *, native: bool
) -> None:
    for marker in MARKERS[:3]:
        if tokenizer.convert_tokens_to_ids(marker) in (None, tokenizer.unk_token_id):
            raise ConfigError(f"{directory}: its tokenizer does not know {marker}. It is no PairRM tokenizer.")
    if native:
        return
    keys = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
    for key, marker in zip(keys, MARKERS[:3], strict=True):
        if content.get(key) is not None and content[key] != tokenizer.convert_tokens_to_ids(marker):
            raise ConfigError(
                f"{directory}: config.json says {key} {content[key]}, its tokenizer says "
                f"{tokenizer.convert_tokens_to_ids(marker)} for {marker}. Download both files again."
            )


def _load_tensors(directory: Path) -> dict[str, Tensor]:
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ConfigError(
            f"{directory} has no .safetensors file (pickled pytorch_model.bin files are not read). "
            "Use llm-blender/PairRM or llm-blender/PairRM-hf as published."
        )
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ConfigError(damage(path, f"{path} is damaged ({error}). Download it again.")) from None
        if twice := sorted(set(found) & set(tensors)):
            raise ConfigError(f"{path} holds {twice[0]}, which another file beside it holds too. Remove one of them.")
        tensors |= found
    return {name: tensor for name, tensor in tensors.items() if name not in _IGNORED_TENSORS}


def _embedding_rows(tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, directory: Path) -> int:
    name = "pretrained_model.embeddings.word_embeddings.weight"
    if name not in tensors:
        raise ConfigError(
            f"{directory} has no tensor {name}, but {_named(sorted(tensors))}. It is no PairRM checkpoint."
        )
    rows = tensors[name].shape[0]
    if rows < len(tokenizer):
        raise ConfigError(
            f"{directory}: {rows} embedding rows, but the tokenizer has {len(tokenizer)} tokens. "
            "The checkpoint and the tokenizer do not belong together."
        )
    return rows


def _named(names: list[str]) -> str:
    """List names -> at most three, then how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}" if names else "none"


def _fill(network: PairRMNetwork, tensors: dict[str, Tensor], directory: Path) -> None:
    """Load the weights: every tensor has its place and every place its tensor, or a ConfigError names the odd ones."""
    places = network.state_dict()
    missing, unknown = sorted(set(places) - set(tensors)), sorted(set(tensors) - set(places))
    if missing or unknown:
        raise ConfigError(
            f"{directory} does not fit PairRM: missing are {_named(missing)}; without a place are {_named(unknown)}. "
            "Use llm-blender/PairRM as published."
        )
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise ConfigError(
                f"{directory}: {name} has the shape {tuple(tensors[name].shape)}, its config says {tuple(place.shape)}."
            )
    network.load_state_dict(tensors)
