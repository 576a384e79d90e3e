"""The tensors of a Hugging Face directory: opened, and held against what its config.json promises."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, INDEX_FILE, SIDE_FILES, SINGLE_FILE, check_link, weight_map
from megatron_sppo.checkpoints.safetensors_file import Entry, Shape, read_header, read_tensor, some_rows
from megatron_sppo.errors import ConversionError, some_of
from megatron_sppo.storage import contained

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HFCheckpoint:
    """The tensors of a Hugging Face directory, opened but not read."""

    directory: Path
    headers: Mapping[str, bytes]
    """Header of each safetensors file, as it is."""
    entries: Mapping[str, Entry]

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return read_tensor(self.entries[name])

    def read_rows(self, name: str, start: int, count: int) -> Tensor:
        """Read some rows of one tensor -> [count, ...]."""
        return read_tensor(some_rows(self.entries[name], start, count))

    @property
    def is_quantized(self) -> bool:
        """Whether some tensors are other than the files hold them (mxfp4.py, fp8.py): no `layout` describes them."""
        return False

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each tensor's shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def layout(self) -> dict[str, Any]:
        """Describe how the tensors lie in the files, for `kept_files`."""
        index = self.directory / INDEX_FILE
        return {
            "files": {name: base64.b64encode(raw).decode() for name, raw in self.headers.items()},
            "index": index.read_text(encoding="utf-8") if SINGLE_FILE not in self.headers else None,
        }


def open_hf_checkpoint(directory: Path, *, quantized: bool = False) -> HFCheckpoint:
    """Open the safetensors files of a directory; links of the hub's cache to its blobs are followed.

    Args:
        quantized: let tensors pass that are of quantized weights.

    Raises:
        ConversionError: pickled weights only, a shard that is missing, cut short or outside, a tensor twice or absent,
            a link that leads elsewhere.
    """
    directory = Path(directory)
    places: dict[str, str] = {}
    for name in (*SIDE_FILES, SINGLE_FILE, INDEX_FILE):
        check_link(directory, name)
    if (directory / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
        others = set(weight_map(directory).values()) - {SINGLE_FILE} if (directory / INDEX_FILE).is_file() else set()
        if others:
            raise ConversionError(
                f"{directory} holds {SINGLE_FILE} and an {INDEX_FILE} that names {some_of(sorted(others))}: "
                "transformers loads the first, vLLM the others. Remove what is not this model's."
            )
    elif (directory / INDEX_FILE).is_file():
        places = weight_map(directory)
        files = sorted(set(places.values()))
    else:
        raise ConversionError(_no_weights(directory))
    headers: dict[str, bytes] = {}
    entries: dict[str, Entry] = {}
    for file in files:
        path = contained(directory, file)
        check_link(directory, file)
        if not path.is_file():
            raise ConversionError(f"{directory / INDEX_FILE} names {file}, which is missing. Fetch the model again.")
        headers[file], found = read_header(path, quantized=quantized)
        if double := sorted(set(found) & set(entries)):
            raise ConversionError(
                f"{path} holds {some_of(double)} again; another shard has it too. Fetch the model again."
            )
        entries |= found
    for name, file in places.items():
        if name not in entries or entries[name].file != contained(directory, file):
            raise ConversionError(
                f"{directory / INDEX_FILE} says that {name} is in {file}, which lacks it. Fetch the model again."
            )
    return HFCheckpoint(directory=directory, headers=headers, entries=entries)


def check_tensors(checkpoint: HFCheckpoint, expected: Mapping[str, Shape], *, ignored: Sequence[str]) -> list[str]:
    """Compare what a directory holds with what its config.json promises -> names that hold no weights and are left.

    Raises:
        ConversionError: missing, unknown or mis-shaped tensors, named.
    """
    place = checkpoint.directory
    extra = [name for name in checkpoint.entries if name not in expected]
    if missing := [name for name in expected if name not in checkpoint.entries]:
        instead = f", and holds {some_of(extra)}, which it does not" if extra else ""
        raise ConversionError(
            f"{place} lacks {some_of(missing)}, which its {CONFIG_FILE} promises{instead}. Fetch the model again."
        )
    for name, shape in expected.items():
        if checkpoint.entries[name].shape != shape:
            raise ConversionError(
                f"{place} holds {name} of shape {list(checkpoint.entries[name].shape)} where its {CONFIG_FILE} "
                f"promises {list(shape)}. Weights and config are of two models: fetch both again."
            )
    left = [name for name in extra if name.endswith(tuple(ignored))] if ignored else []
    if "lm_head.weight" in extra and _is_tied(checkpoint):
        left.append("lm_head.weight")
    if "lm_head.weight" in extra and "lm_head.weight" not in left:
        raise ConversionError(
            f"{place} holds an lm_head.weight other than model.embed_tokens.weight, and its {CONFIG_FILE} says "
            "tie_word_embeddings: true, which contradict each other. Set it to false if the model was trained so."
        )
    if unknown := [name for name in extra if name not in left]:
        raise ConversionError(
            f"{place} holds {some_of(unknown)}, for which there is no rule. "
            "The weights have more than the config says: use a plain checkpoint of this family (adapters merged)."
        )
    if left:
        logger.info("left out, for they hold no weights of their own: %s", some_of(left))
    return left


def _no_weights(directory: Path) -> str:
    pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.pth"), *directory.glob("*.pt")])
    if pickled:
        return (
            f"{directory} holds its weights as pickle only ({pickled[0].name}), which can run code and is not read. "
            "If you trust it, write safetensors: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    if gguf := sorted(directory.glob("*.gguf")):
        return f"{directory} holds GGUF weights ({gguf[0].name}). Use the model's safetensors checkpoint."
    return f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}. Fetch the model's weights."


def _is_tied(checkpoint: HFCheckpoint) -> bool:
    output, embedding = checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight")
    return output.equal(embedding)
