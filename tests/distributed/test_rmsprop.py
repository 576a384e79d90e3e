"""RMSprop inside Megatron's optimizers is torch.optim.RMSprop bit for bit, in every layout and across resharding.

Three steps in one layout, a checkpoint, three more in another. The gradient that each step's optimizer was given is
gathered and exported by the converter; torch's own optimizer, run on the gathered parameters with these gradients, must
end at the very weights that the checkpoints hold. Checkpoints hold no first moment; those of earlier versions, which
held one of zeros, resume as well. Real gloo ranks, float32, no clipping (which would scale gradients after they were
recorded).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_sppo.conversion.convert import export_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import PP2, SHARDED, SP, TP2, VPP2
from tests.distributed.truth import reference_of
from tests.distributed.worlds import step_by_step

BASE = "--params-dtype float32 --optimizer rmsprop --lr 1e-3 --lr-decay-style constant --clip-grad 0 --eta 100"
SIZES = "--global-batch-size 8 --micro-batch-size 2 --num-epochs 2"


def exported(checkpoint: Path, target: Path) -> dict[str, Tensor]:
    """Read a Megatron checkpoint's tensors by Hugging Face's names -> {name: tensor}."""
    return load_file(export_checkpoint(checkpoint, target) / "model.safetensors")


def steps_of_an_earlier_version(*arguments: Any) -> None:
    """Run `step_by_step` with a first moment of zeros, in memory and in checkpoints, as RMSprop had it."""
    from megatron_sppo.training import optimizer

    optimizer.moments = lambda _: ("exp_avg", "exp_avg_sq")
    step_by_step(*arguments)


def moments(checkpoint: Path) -> set[str]:
    """Name the optimizer's tensors in a checkpoint -> {"exp_avg_sq", ...}."""
    names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name.split(".")[2] for name in names if name.startswith("optimizer.state.")} - {"fp32_param", "param"}


@pytest.mark.parametrize(
    ("before", "after", "earlier"),
    [
        ((1, ""), (2, f"{TP2} {SP}"), False),
        ((2, VPP2), (2, ""), False),
        ((2, SHARDED), (2, f"{SHARDED} {TP2}"), False),
        ((2, SHARDED), (1, SHARDED), False),
        ((2, SHARDED), (4, SHARDED), False),
        ((4, f"{SHARDED} {PP2}"), (2, SHARDED), False),
        ((2, PP2), (1, ""), True),
        ((2, SHARDED), (1, SHARDED), True),
    ],
)
def test_six_steps_end_where_torchs_own_rmsprop_ends(
    untied: Path, tmp_path: Path, before: tuple[int, str], after: tuple[int, str], earlier: bool
) -> None:
    data, save = write_dataset(tmp_path / "data", untied.parent / "hf"), tmp_path / "save"
    reference = reference_of(PreferenceDataset(data))
    for (world_size, flags), first in ((before, 1), (after, 4)):
        argv = [*BASE.split(), *SIZES.split(), *flags.split()]
        steps = steps_of_an_earlier_version if earlier and first == 1 else step_by_step
        run_ranks(steps, world_size, str(untied), str(data), reference, str(save), argv, first, first + 2)
    assert moments(save / "iter_0000003") == ({"exp_avg", "exp_avg_sq"} if earlier else {"exp_avg_sq"})
    assert moments(save / "iter_0000006") == {"exp_avg_sq"}
    weights = load_file(untied.parent / "hf" / "model.safetensors")
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    theirs = torch.optim.RMSprop(parameters.values(), lr=1e-3, alpha=0.99, eps=1e-8, foreach=False)
    for step in range(1, 7):
        for name, gradient in exported(save / f"gradient_{step}", tmp_path / f"gradient_{step}").items():
            parameters[name].grad = gradient
        theirs.step()
        if step in (3, 6):
            ours = exported(save / f"iter_{step:07d}", tmp_path / f"weights_{step}")
            assert set(ours) == set(parameters)
            for name, parameter in parameters.items():
                assert torch.equal(ours[name], parameter), f"{name} after step {step}"
                assert not torch.equal(ours[name], weights[name])
