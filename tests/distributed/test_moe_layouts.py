"""Loss and gradient of a mixture of experts do not depend on the layout, as `test_layouts.py` shows for dense models.

Truth is Hugging Face's model under autograd and one rank again. Transformers keeps the experts of a layer in two
tensors; their gradients are compared under the per-expert names of the hub's files, which the converter exports.
Not shown here: CUDA, Transformer Engine's grouped experts, the alltoall dispatcher.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.test_layouts import CP2, FULL, OVERLAP_BOTH, PADDED, PP2, SELECTIVE, SHARDED, SP, TP2, VPP2
from tests.distributed.truth import Truth
from tests.models import MIXTURES, tiny_llama

EP2, EP4 = "--expert-model-parallel-size 2", "--expert-model-parallel-size 4"

# (family, ranks, responses of a micro-batch, flags)
LAYOUTS = {
    "one rank, padded": ("qwen3_moe", 1, 4, PADDED),
    "recompute full": ("qwen3_moe", 1, 8, FULL),
    "DP2": ("qwen3_moe", 2, 4, ""),
    "TP2 SP": ("qwen3_moe", 2, 4, f"{TP2} {SP}"),
    "CP2": ("qwen3_moe", 2, 4, CP2),
    "VPP2": ("qwen3_moe", 2, 4, VPP2),
    "EP2": ("qwen3_moe", 2, 4, EP2),
    "EP2 padded": ("qwen3_moe", 2, 4, f"{EP2} {PADDED}"),
    "EP2, one response at a time": ("qwen3_moe", 2, 1, EP2),
    "EP2 recompute selective": ("qwen3_moe", 2, 4, f"{EP2} {SELECTIVE}"),
    "EP2 recompute full": ("qwen3_moe", 2, 4, f"{EP2} {FULL}"),
    "EP2 sharded optimizer, overlapped": ("qwen3_moe", 2, 4, f"{EP2} {OVERLAP_BOTH}"),
    "EP2 within TP2 SP": ("qwen3_moe", 2, 4, f"{EP2} {TP2} {SP}"),
    "EP2 within CP2": ("qwen3_moe", 2, 4, f"{EP2} {CP2}"),
    "EP2 DP2 sharded optimizer": ("qwen3_moe", 4, 4, f"{EP2} {SHARDED}"),
    "EP2 TP2 SP": ("qwen3_moe", 4, 4, f"{EP2} {TP2} {SP}"),
    "EP4 TP2 SP": ("qwen3_moe", 4, 4, f"{EP4} {TP2} {SP}"),
    "EP2 PP2 padded": ("qwen3_moe", 4, 2, f"{EP2} {PP2} {PADDED}"),
    "EP2 VPP2": ("qwen3_moe", 4, 2, f"{EP2} {VPP2}"),
    "EP2 CP2": ("qwen3_moe", 4, 4, f"{EP2} {CP2}"),
    "mixtral, one rank, padded": ("mixtral", 1, 4, PADDED),
    "mixtral, PP2": ("mixtral", 2, 4, PP2),
    "mixtral, EP2 within TP2 SP": ("mixtral", 2, 4, f"{EP2} {TP2} {SP}"),
    "mixtral, EP4": ("mixtral", 4, 2, EP4),
    "mixtral, EP2 PP2": ("mixtral", 4, 2, f"{EP2} {PP2}"),
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


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Truth]:
    """Mixtures by family, each made when a layout first asks for it."""

    @cache
    def find(family: str) -> Truth:
        root = tmp_path_factory.mktemp(family)
        hf = tiny_llama(root / "hf", num_hidden_layers=4, **MIXTURES[family])
        import_checkpoint(hf, root / "megatron")
        names = partial(by_hub_names, family=family)
        data = write_dataset(root / "data", hf)
        return Truth(hf=hf, megatron=root / "megatron", data=data, by_exported_names=names)

    return find


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradient_and_first_log_ratio_are_those_of_one_rank_and_of_hugging_face(
    layout: str, truth_of: Callable[[str], Truth], tmp_path: Path
) -> None:
    family, world_size, micro_batch_size, flags = LAYOUTS[layout]
    truth = truth_of(family)
    exported = truth.assert_equal_under(world_size, f"--micro-batch-size {micro_batch_size} {flags}", tmp_path)
    assert sum(".experts." in name and bool(exported[name].any()) for name in exported) > 24  # of 4 x 4 x 3
