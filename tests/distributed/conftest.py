"""A tiny Llama, tied and untied, as Hugging Face and Megatron checkpoints, and judged responses for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.data.writer import DatasetWriter
from tests.models import BYTE_VOCAB_SIZE, tiny_llama

NUM_PROMPTS = 8
NUM_RESPONSES = 4


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four layers, 8 heads over 4 key/value heads, 259 tokens (no multiple of 128) -> (HF directory, Megatron root)."""
    root = tmp_path_factory.mktemp("llama")
    hf = tiny_llama(root / "hf", num_hidden_layers=4, tie_word_embeddings=request.param)
    import_checkpoint(hf, root / "megatron")
    return hf, root / "megatron"


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untied model alone -> Megatron root."""
    root = tmp_path_factory.mktemp("untied")
    import_checkpoint(tiny_llama(root / "hf", num_hidden_layers=4), root / "megatron")
    return root / "megatron"


def write_dataset(directory: Path, hf: Path, *, num_prompts: int = NUM_PROMPTS) -> Path:
    """Write random prompts of 3 to 20 tokens with four responses of 1 to 24 each and a noisy judge's logits."""
    generator = np.random.default_rng(7)

    def tokens(low: int, high: int) -> list[int]:
        return generator.integers(0, BYTE_VOCAB_SIZE, generator.integers(low, high)).tolist()

    with DatasetWriter(
        directory,
        num_responses=NUM_RESPONSES,
        tokenizer_hash=tokenizer_hash(hf),
        vocab_size=BYTE_VOCAB_SIZE,
        judge="rules:concise",
        preset="paper",
        selection="all",
        rollouts_sha256=None,
    ) as writer:
        for _ in range(num_prompts):
            logits = generator.normal(size=(NUM_RESPONSES, NUM_RESPONSES)).astype(np.float32)
            np.fill_diagonal(logits, 0)
            writer.append(tokens(3, 20), [tokens(1, 24) for _ in range(NUM_RESPONSES)], logits)
    return directory


def all_layouts(*cases: tuple[Any, ...]) -> list[Any]:
    """Mark cases of a parametrised test as those of `--all-layouts`."""
    return [pytest.param(*case, marks=pytest.mark.all_layouts) for case in cases]
