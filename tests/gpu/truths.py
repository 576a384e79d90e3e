"""Models small enough for any test, with their truths: FP8 takes every matrix, even where two ranks share it."""

from pathlib import Path
from typing import Any, TypeVar

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.truth import Truth
from tests.models import MIXTURES, tiny_llama

T = TypeVar("T", bound=Truth)

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"intermediate_size": 512},
    "mixture": {**MIXTURES["qwen3_moe"], "moe_intermediate_size": 128},
}

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
"""Every matrix of two tensor-parallel ranks has sides that are multiples of 128, as blockwise FP8 wants."""


def make_truth(kind: type[T], root: Path, model: str, **settings: Any) -> T:
    """Make one of the models, its import and its dataset."""
    hf = tiny_llama(root / "hf", num_hidden_layers=4, **SIZES, **MODELS[model])
    import_checkpoint(hf, root / "megatron")
    return kind(hf=hf, megatron=root / "megatron", data=write_dataset(root / "data", hf), **settings)
