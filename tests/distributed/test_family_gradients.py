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

from tests.distributed.conftest import all_layouts
from tests.distributed.layouts import (
    CP2,
    EP2,
    FOURS,
    PADDED,
    PP2_OF_THREE,
    SELECTIVE,
    SHARED_PROMPTS,
    SP,
    TP2,
    VPP2,
)
from tests.distributed.truth import Truth
from tests.families import FAMILIES, MIXTURES, family_model

ALL_THREE = f"{SHARED_PROMPTS} {CP2} {TP2} {SP}"
LAYOUTS = {
    "gemma2": {
        "TP2 SP": (2, f"{FOURS} {TP2} {SP}"),
        "CP2": (2, f"{FOURS} {CP2}"),
        "shared CP2": (2, f"{SHARED_PROMPTS} {CP2}"),
        "PP2 TP2 SP recompute": (4, f"{FOURS} {PP2_OF_THREE} {TP2} {SP} {SELECTIVE}"),
    },
    "gemma3_text": {"shared TP2 CP2 SP": (4, ALL_THREE)},
    "gpt_oss": {
        "CP2": (2, f"{FOURS} {CP2}"),
        "PP2": (2, f"{FOURS} {PP2_OF_THREE}"),
        "EP2 TP2 SP": (2, f"{FOURS} {TP2} {SP} {EP2}"),
    },
    "llama, biases": {"TP2 SP": (2, f"{FOURS} {TP2} {SP}")},
    "llama, scaled rope": {"CP2": (2, f"{FOURS} {CP2}")},
    "mistral": {"PP2": (2, f"{FOURS} {PP2_OF_THREE}")},
    "qwen2": {"TP2 SP": (2, f"{FOURS} {TP2} {SP}")},
    "qwen2, window": {"CP2": (2, f"{FOURS} {CP2}")},
    "qwen3": {"TP2 SP": (2, f"{FOURS} {TP2} {SP}")},
    "qwen3, yarn": {"CP2": (2, f"{FOURS} {CP2}")},
    "ministral": {"PP2": (2, f"{FOURS} {PP2_OF_THREE}")},
    "phi3": {"TP2 SP": (2, f"{FOURS} {TP2} {SP}")},
    "olmo2": {"TP2": (2, f"{FOURS} {TP2}"), "TP2 SP": (2, f"{FOURS} {TP2} {SP}")},
    "olmo3": {"TP2 SP": (2, f"{FOURS} {TP2} {SP}"), "CP2 padded": (2, f"{FOURS} {CP2} {PADDED}")},
    "qwen3_5_text": {"shared TP2 CP2 SP": (4, ALL_THREE)},
    "phi3, longrope of a half": {
        "CP2": (2, f"{FOURS} {CP2}"),
        "TP2 SP padded": (2, f"{FOURS} {TP2} {SP} {PADDED}"),
    },
    # Six layers: one and one in the first stage's chunks, two and two in the last one's.
    "llama": {"PP2 VPP2 uneven": (2, f"{FOURS} {VPP2} --decoder-first-pipeline-num-layers 2")},
    "ministral3": {"CP2 padded": (2, f"{FOURS} {CP2} {PADDED}"), "shared TP2 CP2 SP": (4, ALL_THREE)},
    "mistral, window": {"CP2 padded": (2, f"{FOURS} {CP2} {PADDED}"), "shared TP2 CP2 SP": (4, ALL_THREE)},
}
# Of each family without experts; the tests of a change take what stands above.
FURTHER_LAYOUTS = {
    "one rank padded": (1, f"{FOURS} {PADDED}"),
    "TP2 SP": (2, f"{FOURS} {TP2} {SP}"),
    "PP2": (2, f"{FOURS} {PP2_OF_THREE}"),
    "CP2": (2, f"{FOURS} {CP2}"),
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
    def find(family: str, *, is_deep: bool, shares_prompts: bool) -> Truth:
        root = tmp_path_factory.mktemp("family")
        hf = family_model(root / "hf", family, num_hidden_layers=6 if is_deep else 3)
        return Truth.of(hf, one_rank=SHARED_PROMPTS if shares_prompts else FOURS)

    return find


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_loss_and_gradient_equal_hugging_faces(
    family: str, layout: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    world_size, flags = {**FURTHER_LAYOUTS, **LAYOUTS.get(family, {})}[layout]
    truth = truth_of(family, is_deep="VPP2" in layout, shares_prompts=SHARED_PROMPTS in flags)
    truth.assert_equal_under(world_size, flags, tmp_path)
