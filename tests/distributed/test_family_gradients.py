"""Loss, log-probabilities and gradient of the families that compute other things than Llama, as in test_layouts.py.

Truth is Hugging Face's model under autograd, its eager attention and its log-softmax: windows, soft caps, scaled
embeddings, norms behind the units (sequence parallelism adds their gradients up), norms over the heads of all
tensor-parallel ranks, biases, sinks, clamped experts, rotary tables of two kinds, and gated delta nets. Documents are
longer than the window of eight tokens, and pipeline stages uneven.
Not shown here: CUDA, Transformer Engine, FP8.
"""

from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.truth import Truth
from tests.families import family_model

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
CASES = [(family, layout) for family, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Truth]:
    """By family, without and with shared prompts, whose global batches hold other responses."""
    made = {}
    for family in LAYOUTS:
        root = tmp_path_factory.mktemp("family")
        hf = family_model(root / "hf", family, num_hidden_layers=6 if family == "llama" else 3)
        import_checkpoint(hf, root / "megatron")
        model = {"hf": hf, "megatron": root / "megatron", "data": write_dataset(root / "data", hf)}
        made[family, False], made[family, True] = Truth(**model), Truth(**model, one_rank=SHARED)
    return made


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_loss_and_gradient_equal_hugging_faces(
    family: str, layout: str, truths: dict[tuple[str, bool], Truth], tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[family][layout]
    truths[family, SHARED in flags].assert_equal_under(world_size, flags, tmp_path)
