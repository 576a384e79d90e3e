"""examples/pretrain_sppo.py whole, as several ranks on emulated GPUs: what tests/gpu/test_pretrain.py says of one."""

from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import OVERLAP, PP2, SHARDED, SP, TP2
from tests.gpu.test_pretrain import FP8, assert_starts_at_zero_and_resumes, model

__all__ = ["model"]

# (ranks, flags)
RUNS = {
    "tensorwise, sharded optimizer": (2, f"{FP8} tensorwise {SHARDED} --micro-batch-size 2"),
    "sharded optimizer, gathered late": (2, f"{SHARDED} {OVERLAP} overlap_param_gather=true --micro-batch-size 2"),
    "sharded optimizer, saved in the background": (2, f"{SHARDED} --async-save --micro-batch-size 2"),
    "tensorwise, TP2 SP PP2": (4, f"{FP8} tensorwise {TP2} {SP} {PP2}"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_starts_at_zero_and_resumes_bit_for_bit(name: str, model: Path, tmp_path: Path) -> None:
    ranks, flags = RUNS[name]
    assert_starts_at_zero_and_resumes(model, tmp_path, flags, ranks=ranks, launch=run_ranks)
