"""Loss, log-probabilities and gradient of the families that compute other things than Llama, as in test_layouts.py.

Truth is Hugging Face's model under autograd, its eager attention and its log-softmax: windows, soft caps, scaled
embeddings, norms behind the units (sequence parallelism adds their gradients up), norms over the heads of all
tensor-parallel ranks, biases, sinks, clamped experts, rotary tables of two kinds, and gated delta nets. Documents are
longer than the window of eight tokens, and pipeline stages uneven.
Not shown here: CUDA, Transformer Engine, FP8.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import all_layouts, write_dataset
from tests.distributed.truth import Truth
from tests.families import FAMILIES, MIXTURES, family_model

TP2 = "--micro-batch-size 4 --tensor-model-parallel-size 2"
CP2 = "--micro-batch-size 4 --context-parallel-size 2"
SHARED = "--packed-sequence-size 96 --share-prompts"
# Three layers over two stages.
PP2 = "--micro-batch-size 4 --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 2"
LAYOUTS = {
    "gemma2": {
        "TP2 SP": (2, f"{TP2} --sequence-parallel"),
        "CP2": (2, CP2),
        "shared CP2": (2, f"{SHARED} --context-parallel-size 2"),
        "PP2 TP2 SP recompute": (
            4,
            f"{PP2} --tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective",
        ),
    },
    "gemma3_text": {
        "shared TP2 CP2 SP": (
            4,
            f"{SHARED} --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
        ),
    },
    "gpt_oss": {
        "CP2": (2, CP2),
        "PP2": (2, PP2),
        "EP2 TP2 SP": (2, f"{TP2} --sequence-parallel --expert-model-parallel-size 2"),
    },
    "llama, biases": {"TP2 SP": (2, f"{TP2} --sequence-parallel")},
    "llama, scaled rope": {"CP2": (2, CP2)},
    "mistral": {"PP2": (2, PP2)},
    "qwen2": {"TP2 SP": (2, f"{TP2} --sequence-parallel")},
    "qwen2, window": {"CP2": (2, CP2)},
    "qwen3": {"TP2 SP": (2, f"{TP2} --sequence-parallel")},
    "qwen3, yarn": {"CP2": (2, CP2)},
    "ministral": {"PP2": (2, PP2)},
    "phi3": {"TP2 SP": (2, f"{TP2} --sequence-parallel")},
    "olmo2": {"TP2": (2, TP2), "TP2 SP": (2, f"{TP2} --sequence-parallel")},
    "olmo3": {"TP2 SP": (2, f"{TP2} --sequence-parallel"), "CP2 padded": (2, f"{CP2} --no-packing")},
    "qwen3_5_text": {
        "shared TP2 CP2 SP": (
            4,
            f"{SHARED} --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
        ),
    },
    "phi3, longrope of a half": {"CP2": (2, CP2), "TP2 SP padded": (2, f"{TP2} --sequence-parallel --no-packing")},
    "llama": {
        # Six layers: one and one in the first stage's chunks, two and two in the last one's.
        "PP2 VPP2 uneven": (
            2,
            "--micro-batch-size 4 --pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2 "
            "--decoder-first-pipeline-num-layers 2",
        )
    },
    "ministral3": {
        "CP2 padded": (2, f"{CP2} --no-packing"),
        "shared TP2 CP2 SP": (
            4,
            f"{SHARED} --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
        ),
    },
    "mistral, window": {
        "CP2 padded": (2, f"{CP2} --no-packing"),
        "shared TP2 CP2 SP": (
            4,
            f"{SHARED} --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
        ),
    },
}
# Of each family without experts; the tests of a change take what stands above.
FURTHER_LAYOUTS = {
    "one rank padded": (1, "--micro-batch-size 4 --no-packing"),
    "TP2 SP": (2, f"{TP2} --sequence-parallel"),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
}
CASES = [
    *((family, layout) for family, layouts in LAYOUTS.items() for layout in layouts),
    *all_layouts(
        *(
            (family, layout)
            for family in FAMILIES
            for layout in FURTHER_LAYOUTS
            if family not in MIXTURES and layout not in LAYOUTS.get(family, ())
        )
    ),
]


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Truth]:
    """By family, without and with shared prompts, whose global batches hold other responses; made when asked for."""

    @cache
    def model_of(family: str, *, num_layers: int) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("family")
        hf = family_model(root / "hf", family, num_hidden_layers=num_layers)
        import_checkpoint(hf, root / "megatron")
        return {"hf": hf, "megatron": root / "megatron", "data": write_dataset(root / "data", hf)}

    @cache
    def find(family: str, *, is_deep: bool, shares_prompts: bool) -> Truth:
        settings = {"one_rank": SHARED} if shares_prompts else {}
        return Truth(**model_of(family, num_layers=6 if is_deep else 3), **settings)

    return find


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_loss_and_gradient_equal_hugging_faces(
    family: str, layout: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    world_size, flags = {**FURTHER_LAYOUTS, **LAYOUTS.get(family, {})}[layout]
    truth = truth_of(family, is_deep="VPP2" in layout, shares_prompts=SHARED in flags)
    truth.assert_equal_under(world_size, flags, tmp_path)
