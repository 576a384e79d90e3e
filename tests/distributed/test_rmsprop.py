"""RMSprop inside Megatron's optimizers is torch.optim.RMSprop bit for bit, in every layout and across resharding.

Three steps in one layout, a checkpoint, three more in another. The gradient that each step's optimizer was given is
gathered and exported by the converter; torch's own optimizer, run on the gathered parameters with these gradients, must
end at the very weights that the checkpoints hold. Real gloo ranks, float32, no clipping (which would scale gradients
after they were recorded).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_sppo.conversion.convert import export_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import PP2, SHARDED, SP, TP2, VPP2
from tests.distributed.truth import reference_of
from tests.distributed.worlds import step_by_step

BASE = "--params-dtype float32 --optimizer rmsprop --lr 1e-3 --lr-decay-style constant --clip-grad 0 --eta 100"
SIZES = "--global-batch-size 8 --micro-batch-size 2 --num-epochs 2"


def exported(checkpoint: Path, target: Path) -> dict[str, Tensor]:
    """Read a Megatron checkpoint's tensors by Hugging Face's names -> {name: tensor}."""
    return load_file(export_checkpoint(checkpoint, target) / "model.safetensors")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, ""), (2, f"{TP2} {SP}")),
        ((2, VPP2), (2, "")),
        ((2, SHARDED), (2, f"{SHARDED} {TP2}")),
        ((2, SHARDED), (1, SHARDED)),
        ((2, SHARDED), (4, SHARDED)),
        ((4, f"{SHARDED} {PP2}"), (2, SHARDED)),
    ],
)
def test_six_steps_end_where_torchs_own_rmsprop_ends(
    untied: Path, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    data, save = write_dataset(tmp_path / "data", untied.parent / "hf"), tmp_path / "save"
    reference = reference_of(PreferenceDataset(data))
    for (world_size, flags), first in ((before, 1), (after, 4)):
        argv = [*BASE.split(), *SIZES.split(), *flags.split()]
        run_ranks(step_by_step, world_size, str(untied), str(data), reference, str(save), argv, first, first + 2)
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
