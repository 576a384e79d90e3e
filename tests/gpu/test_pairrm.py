"""PairRM on a GPU, on a random PairRM of a real width: neighbours, precision."""

import os
import random

import numpy as np
import pytest

pytest.importorskip("sentencepiece", reason="PairRM's tokenizer: pip install 'megatron-sppo[judge]'")

from megatron_sppo.judge.pairrm.judge import PairRMJudge
from tests.unit.judge.groups import random_group
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm

pytestmark = [pytest.mark.gpu]

# A real PairRM's width and texts, by which kernels are chosen; small where the GPU is emulated and has none.
NUM_HEADS, NUM_WORDS = (1, 20) if os.environ.get("CUDALESS") else (16, 200)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("pairrm")
    native, _ = make_tiny_pairrm(directory, hidden_size=64 * NUM_HEADS, num_layers=4, num_heads=NUM_HEADS)
    return str(native)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_do_not_depend_on_their_neighbours_to_the_last_bit(checkpoint: str, dtype: str) -> None:
    """A pair's place in its batch and the pairs beside it change; the batch's shape follows from its length alone."""
    judge = PairRMJudge(checkpoint, reads="message", device="cuda", dtype=dtype)
    rng = random.Random(40)
    groups = [random_group(rng, number, 5, high=NUM_WORDS) for number in range(8)]
    whole = judge.judge_logits(groups)
    for seed in range(4):
        rng = random.Random(seed)
        some = rng.sample(range(8), rng.randint(1, 8))
        strangers = [random_group(rng, 9, 3, high=NUM_WORDS + NUM_WORDS // 4) for _ in range(3)]
        logits = judge.judge_logits([*strangers, *(groups[number] for number in some)])[3:]
        for number, matrix in zip(some, logits, strict=True):
            np.testing.assert_array_equal(matrix, whole[number])


def test_float32_logits_are_those_of_the_cpu_and_bfloat16_ones_rank_alike(checkpoint: str) -> None:
    rng = random.Random(41)
    groups = [random_group(rng, number, 4, high=NUM_WORDS // 3) for number in range(3)]
    cpu = np.stack(PairRMJudge(checkpoint, reads="message", device="cpu").judge_logits(groups))
    float32, bfloat16 = (
        np.stack(PairRMJudge(checkpoint, reads="message", device="cuda", dtype=dtype).judge_logits(groups))
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(float32, cpu, rtol=0, atol=1e-3)
    assert np.corrcoef(bfloat16.ravel(), cpu.ravel())[0, 1] > 0.99
