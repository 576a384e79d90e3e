"""A reference pass that is killed and stopped: the same command goes on from its pieces, to the same bytes.

One process on the tiny Llama, forked (forked.py), a piece after each step. Where the reference is read and refused:
tests/distributed.
"""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.e2e.forked import Training, open_files
from tests.e2e.test_pretrain_signals import numbers
from tests.models import tiny_llama

STEPS = 36
"""Of three epochs, the last of which the run does not finish: of as many steps is the reference pass."""
FLAGS = (
    "--params-dtype float32 --lr 1e-4 --eta 10 --global-batch-size 2 --micro-batch-size 1 --num-epochs 3 "
    f"--reference-per-epoch --reference-piece-seconds 1e-9 --train-iters {STEPS} --no-tensorboard"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    import_checkpoint(tiny_llama(root / "hf"), root / "megatron")
    write_dataset(root / "data", root / "hf")
    shutil.copytree(root / "data", root / "whole_data")
    assert start(root, "whole").wait() == 0
    return root


def start(root: Path, name: str) -> Training:
    """Train into `name` on the data `name`_data."""
    return Training(["--load", root / "megatron", "--data", root / f"{name}_data", "--save", root / name, *FLAGS])


def reference_of(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(data.glob("reference*"))}


def wait_for_pieces(data: Path, process: Training, count: int) -> None:
    while process.poll() is None and len(list(data.glob("reference.pieces-*/[0-9]*.json"))) < count:
        time.sleep(0.001)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
@pytest.mark.counts("signals")
def test_a_reference_pass_goes_on_where_it_was_ended_and_ends_with_the_same_bytes(world: Path, signum: int) -> None:
    """Ended after 3 pieces and again after 3 more: what is left is what was not in a piece. Training follows."""
    name, done = f"ended_by_{signum}", 0
    data = world / f"{name}_data"
    shutil.copytree(world / "data", data)
    for _ in range(2):
        process = start(world, name)
        wait_for_pieces(data, process, done + 3)
        process.send_signal(signum)
        said = process.communicate(timeout=120)[1]
        assert process.wait() == (-signal.SIGKILL if signum == signal.SIGKILL else 143), said
        assert not (data / "reference.json").exists()
        left = re.search(r"goes on: (\d+) responses are there, (\d+) steps are left", said)
        assert (left is None) == (done == 0)
        if left is not None:
            assert int(left[1]) == 2 * done and int(left[2]) == STEPS - done
        done = len(list(data.glob("reference.pieces-*/[0-9]*.json")))
        assert done < STEPS
        if signum == signal.SIGTERM:
            assert "stopped by a signal after step" in said
    assert start(world, name).wait() == 0
    assert reference_of(data) == reference_of(world / "whole_data")
    assert set(reference_of(data)) == {"reference.bin", "reference.idx", "reference.json"}
    assert numbers(world / name) == numbers(world / "whole")
    assert open_files(world / name) == open_files(data) == []
