"""How often a training step makes the host wait for the GPU: once, where Megatron-Core reads the norm that it clips by.

The emulation notes every wait of the kinds that its device.py names: values read on the host, copies of memory that is
not pinned, synchronisation. A run of four steps waits as often as one of two, and two steps' waits more. Not proven:
what waits in NCCL's and the kernels' own code; pipeline stages, whose batched messages the host waits for.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sppo.training import parallel
from tests.cudaless import device
from tests.distributed.conftest import write_dataset
from tests.distributed.worlds import pretrain

FLAGS = (
    "--params-dtype bfloat16 --transformer-impl transformer_engine --lr 1e-5 --eta 100 --global-batch-size 8 "
    "--no-tensorboard"
)


@pytest.fixture(autouse=True)
def _shut_down() -> Iterator[None]:
    yield
    parallel.shut_down()


def shape(wait: device.HostWait) -> str:
    """Give the shape of what is waited for, but of pickled objects: these are a byte longer at times."""
    return "" if "dist_checkpointing/validation.py" in wait.caller else str(wait.shape)


@pytest.mark.parametrize("flags", ["--micro-batch-size 4", "--packed-sequence-size 256 --fp8 hybrid"])
def test_the_host_waits_once_a_step(flags: str, hf: Path, megatron: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", hf)  # 32 responses: four steps an epoch

    def waits(train_iters: int, save: str = "save") -> Counter[str]:
        device.LOG.clear()
        places = ["--load", str(megatron), "--data", str(data), "--save", str(tmp_path / f"{save}{train_iters}")]
        assert pretrain([*places, *FLAGS.split(), *flags.split(), "--train-iters", str(train_iters)]) == 0
        return Counter(f"{wait.what} {shape(wait)} {wait.caller}" for wait in device.LOG)

    waits(4, "first")  # the reference pass of all four steps, and what is made once a process
    found = waits(4)
    found.subtract(waits(2))
    of_two_steps = {wait: count for wait, count in found.items() if count}
    assert sum(of_two_steps.values()) == 2 and all("clip_grads.py" in wait for wait in of_two_steps), of_two_steps
