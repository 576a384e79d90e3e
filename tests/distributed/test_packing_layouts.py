"""Loss and gradient are the same however a global batch is packed: by tokens, and with prompts computed once.

Truth is Hugging Face's model under autograd, one unpadded sequence at a time, as in `test_layouts.py`. The responses
have 1 to 23 tokens and their prompts 3 to 19, so a pack of 96 tokens holds about three in a row of them.
Not shown here: CUDA, Transformer Engine, FlexAttention (its mask: tests/unit/model/test_shared_prompts.py).
"""

import json
from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.truth import Truth
from tests.distributed.worlds import pretrain
from tests.models import MIXTURES, tiny_llama

LAYOUTS = {
    "one rank": (1, "--packed-sequence-size 96"),
    "TP2 SP": (2, "--packed-sequence-size 96 --tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--packed-sequence-size 96 --pipeline-model-parallel-size 2"),
    "CP2": (2, "--packed-sequence-size 96 --context-parallel-size 2"),
    "DP2": (2, "--packed-sequence-size 96"),
    "DP4": (4, "--packed-sequence-size 64"),
    "TP2 PP2": (
        4,
        "--packed-sequence-size 96 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
    "shared, one rank": (1, "--packed-sequence-size 96 --share-prompts"),
    "shared, recompute": (1, "--packed-sequence-size 96 --share-prompts --recompute-granularity full"),
    "shared, TP2 SP": (
        2,
        "--packed-sequence-size 96 --share-prompts --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "shared, PP2": (2, "--packed-sequence-size 96 --share-prompts --pipeline-model-parallel-size 2"),
    "shared, DP2": (2, "--packed-sequence-size 48 --share-prompts"),
}
MIXTURE_LAYOUTS = {
    "EP2": (2, "--packed-sequence-size 96 --expert-model-parallel-size 2"),
    "shared, EP2": (2, "--packed-sequence-size 96 --share-prompts --expert-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def truths(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Truth]:
    """The dense model; without and with shared prompts, whose global batches hold other responses."""
    hf = untied.parent / "hf"
    data = write_dataset(tmp_path_factory.mktemp("data") / "data", hf)
    return {shared: Truth(hf=hf, megatron=untied, data=data) for shared in (False, True)}


@pytest.fixture(scope="module")
def mixture_truths(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Truth]:
    """Qwen3-MoE; transformers' stacked experts are left out of the comparison by name (see `test_moe_layouts.py`)."""
    from tests.distributed.test_moe_layouts import by_hub_names

    root = tmp_path_factory.mktemp("mixture")
    hf = tiny_llama(root / "hf", num_hidden_layers=4, **MIXTURES["qwen3_moe"])
    import_checkpoint(hf, root / "megatron")
    data = write_dataset(root / "data", hf)

    def names(gradients: dict) -> dict:
        return by_hub_names(gradients, "qwen3_moe")

    return {
        shared: Truth(hf=hf, megatron=root / "megatron", data=data, by_exported_names=names) for shared in (False, True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_equal_hugging_faces_under(layout: str, truths: dict[bool, Truth], tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    truths["--share-prompts" in flags].assert_equal_under(world_size, flags, tmp_path)


@pytest.mark.parametrize("layout", MIXTURE_LAYOUTS)
def test_a_mixtures_loss_and_gradient_equal_hugging_faces_under(
    layout: str, mixture_truths: dict[bool, Truth], tmp_path: Path
) -> None:
    world_size, flags = MIXTURE_LAYOUTS[layout]
    mixture_truths["--share-prompts" in flags].assert_equal_under(world_size, flags, tmp_path)
