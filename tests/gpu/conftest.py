"""A model whose sizes suit FP8 in every recipe, and judged responses for it, once for all tests on a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.training import parallel
from tests.distributed.conftest import write_dataset
from tests.models import tiny_llama


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """These tests are ranks themselves: what one that failed left behind would fail all later ones."""
    yield
    parallel.shut_down()


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of 512 channels, 8 heads of 64 over 2, in bfloat16: every side of a matrix is a multiple of 128."""
    return tiny_llama(
        tmp_path_factory.mktemp("gpu") / "hf",
        num_hidden_layers=4,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        dtype="bfloat16",
    )


@pytest.fixture(scope="session")
def megatron(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu") / "megatron"
    import_checkpoint(hf, root)
    return root


@pytest.fixture(scope="session")
def data(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("gpu") / "data", hf)
