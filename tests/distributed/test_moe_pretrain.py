"""The pretraining script on a mixture of experts: same losses and gradient norms in every layout, and resuming.

As `test_pretrain.py`, which has the dense models.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import all_layouts, write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_pretrain import (
    BASE,
    assert_resumes_bit_exactly,
    assert_resumes_in_another_layout,
    metrics,
)
from tests.distributed.worlds import pretrain
from tests.models import MIXTURES, tiny_llama

Run = Callable[..., list[int]]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts, and judged responses for them -> the directory with `megatron` and `data`."""
    root = tmp_path_factory.mktemp("mixture")
    import_checkpoint(tiny_llama(root / "hf", **MIXTURES["qwen3_moe"]), root / "megatron")
    write_dataset(root / "data", root / "hf")
    return root


@pytest.fixture
def run(mixture: Path, tmp_path: Path) -> Run:
    """Start the script in a world of ranks -> exit codes."""
    shutil.copytree(mixture / "data", tmp_path / "data")

    def start(save: Path, flags: str = "", *, world_size: int = 1) -> list[int]:
        places = ["--load", str(mixture / "megatron"), "--data", str(tmp_path / "data"), "--save", str(save)]
        return run_ranks(pretrain, world_size, [*places, *BASE.split(), *flags.split()])

    return start


@pytest.fixture(scope="module")
def one_process(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[float, float]]]:
    """Train on one rank, once for each set of flags -> loss and gradient norm of each step."""

    @cache
    def train(flags: str) -> list[tuple[float, float]]:
        root = tmp_path_factory.mktemp("one")
        shutil.copytree(mixture / "data", root / "data")  # the reference that it leaves there is one rank's
        places = ["--load", str(mixture / "megatron"), "--data", str(root / "data"), "--save", str(root / "save")]
        assert run_ranks(pretrain, 1, [*places, *BASE.split(), *flags.split()]) == [0]
        return losses_and_norms(root / "save")

    return train


def losses_and_norms(save: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(save)]


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, "--expert-model-parallel-size 2"),
        (2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
        (4, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
        (4, "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
        (4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        (2, "--expert-model-parallel-size 2 --context-parallel-size 2"),
        (2, "--expert-model-parallel-size 2 --optimizer rmsprop"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_training_gives_the_losses_and_gradient_norms_of_one_process(
    run: Run, one_process: Callable[[str], list[tuple[float, float]]], tmp_path: Path, world_size: int, flags: str
) -> None:
    assert run(tmp_path / "many", flags, world_size=world_size) == [0] * world_size
    expected = one_process("--optimizer rmsprop" if "rmsprop" in flags else "")
    for many, one in zip(losses_and_norms(tmp_path / "many"), expected, strict=True):
        assert many == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, "--expert-model-parallel-size 2"),
        (2, "--expert-model-parallel-size 2 --use-distributed-optimizer --params-dtype bfloat16"),
        (4, "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_a_resumed_run_is_bit_exact(run: Run, tmp_path: Path, world_size: int, flags: str) -> None:
    assert_resumes_bit_exactly(run, tmp_path / "save", world_size, flags)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            (2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
            (4, "--expert-model-parallel-size 4 --use-distributed-optimizer"),
        ),
        ((2, "--pipeline-model-parallel-size 2"), (2, "--expert-model-parallel-size 2")),
        (
            (2, "--optimizer rmsprop --tensor-model-parallel-size 2 --sequence-parallel"),
            (2, "--optimizer rmsprop --expert-model-parallel-size 2 --context-parallel-size 2"),
        ),
        *all_layouts(
            ((2, "--expert-model-parallel-size 2"), (4, "--expert-model-parallel-size 4")),
            ((2, "--expert-model-parallel-size 2"), (1, "")),
        ),
    ],
)
def test_a_run_resumes_in_another_layout(run: Run, tmp_path: Path, before: tuple, after: tuple) -> None:
    assert_resumes_in_another_layout(run, tmp_path / "save", before, after)
