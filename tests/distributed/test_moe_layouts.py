"""Loss and gradient of a mixture of experts do not depend on the layout, as `test_layouts.py` shows for dense models.

Truth is Hugging Face's model under autograd again. Transformers keeps the experts of a layer in two tensors; their
gradients are compared under the per-expert names of the hub's files, which the converter exports.
Not shown here: CUDA, Transformer Engine's grouped experts, the alltoall dispatcher.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.truth import Truth
from tests.models import MIXTURES, tiny_llama

LAYOUTS = {
    "one rank": (1, "--micro-batch-size 4"),
    "one rank, padded": (1, "--micro-batch-size 4 --no-packing"),
    "recompute": (1, "--micro-batch-size 8 --recompute-granularity full"),
    "DP2": (2, "--micro-batch-size 4"),
    "TP2 SP": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--micro-batch-size 4 --pipeline-model-parallel-size 2"),
    "EP2": (2, "--micro-batch-size 4 --expert-model-parallel-size 2"),
    "EP2 padded": (2, "--micro-batch-size 4 --expert-model-parallel-size 2 --no-packing"),
    "EP2, one at a time": (2, "--micro-batch-size 1 --expert-model-parallel-size 2"),
    "EP2 DP2": (4, "--micro-batch-size 4 --expert-model-parallel-size 2"),
    "EP4": (4, "--micro-batch-size 2 --expert-model-parallel-size 4"),
    "EP2 within TP2 SP": (
        2,
        "--micro-batch-size 4 --expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "EP2 TP2 SP": (
        4,
        "--micro-batch-size 4 --expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "EP4 TP2 SP": (
        4,
        "--micro-batch-size 4 --expert-model-parallel-size 4 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "EP2 PP2": (4, "--micro-batch-size 2 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "EP2 PP2 padded": (
        4,
        "--micro-batch-size 2 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2 --no-packing",
    ),
    "EP2 within CP2": (2, "--micro-batch-size 4 --expert-model-parallel-size 2 --context-parallel-size 2"),
    "EP2 recompute": (2, "--micro-batch-size 4 --expert-model-parallel-size 2 --recompute-granularity full"),
}


def by_hub_names(gradients: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """Cut transformers' stacked experts, [experts, 2 x channels, hidden] and [experts, hidden, channels], apart."""
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    named = {}
    for name, gradient in gradients.items():
        place, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, both in enumerate(gradient):
                for part, half in zip((gate, up), both.chunk(2), strict=True):
                    named[f"{place}.experts.{expert}.{part}.weight"] = half
        elif kind == "down_proj":
            for expert, matrix in enumerate(gradient):
                named[f"{place}.experts.{expert}.{down}.weight"] = matrix
        else:
            named[name] = gradient
    if family != "mixtral":
        return named
    return {name.replace(".mlp.", ".block_sparse_moe."): gradient for name, gradient in named.items()}


@pytest.fixture(scope="module", params=MIXTURES)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    root = tmp_path_factory.mktemp(request.param)
    hf = tiny_llama(root / "hf", num_hidden_layers=4, **MIXTURES[request.param])
    import_checkpoint(hf, root / "megatron")
    names = partial(by_hub_names, family=request.param)
    data = write_dataset(root / "data", hf)
    return Truth(hf=hf, megatron=root / "megatron", data=data, by_exported_names=names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_equal_hugging_faces_under(layout: str, truth: Truth, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    exported = truth.assert_equal_under(world_size, flags, tmp_path)
    assert sum(".experts." in name and bool(exported[name].any()) for name in exported) > 24  # of 4 x 4 x 3
