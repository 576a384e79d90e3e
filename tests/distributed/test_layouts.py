"""Loss and gradient do not depend on the layout (ALGORITHM.md, section 4.4).

Truth is Hugging Face's model under autograd, one unpadded sequence at a time, with the loss written out as
(3.6): mean over responses of (log pi_theta - reference - eta (w - 1/2))^2. Each layout's gradient is saved in the
weights' place, exported by the converter, and compared by Hugging Face's names, so the head, every collective,
finalize_model_grads and the converter stand or fall together. Real gloo ranks; the float32 tolerances are stated below.
Not shown here: CUDA, Transformer Engine, FP8.
"""

from pathlib import Path

import pytest

from tests.distributed.conftest import write_dataset
from tests.distributed.truth import Truth

LAYOUTS = {
    "one rank": (1, "--micro-batch-size 4"),
    "one rank, padded": (1, "--micro-batch-size 4 --no-packing"),
    "one rank, one at a time": (1, "--micro-batch-size 1"),
    "recompute": (1, "--micro-batch-size 8 --recompute-granularity full"),
    "TP2": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2"),
    "TP2 SP": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel"),
    "TP2 SP padded": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel --no-packing"),
    "TP4": (4, "--micro-batch-size 4 --tensor-model-parallel-size 4"),
    "PP2": (2, "--micro-batch-size 4 --pipeline-model-parallel-size 2"),
    "PP2 padded": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2 --no-packing"),
    "PP4": (4, "--micro-batch-size 2 --pipeline-model-parallel-size 4"),
    "PP2 VPP2": (
        2,
        "--micro-batch-size 4 --pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2",
    ),
    "DP2": (2, "--micro-batch-size 4"),
    "DP4": (4, "--micro-batch-size 2"),
    "DP2 overlap": (
        2,
        "--micro-batch-size 2 --ddp-config overlap_grad_reduce=true bucket_size=4096",
    ),
    "PP2 overlap": (
        2,
        "--micro-batch-size 2 --pipeline-model-parallel-size 2 --ddp-config overlap_grad_reduce=true",
    ),
    "CP2": (2, "--micro-batch-size 4 --context-parallel-size 2"),
    "CP2 padded": (2, "--micro-batch-size 4 --context-parallel-size 2 --no-packing"),
    "CP4": (4, "--micro-batch-size 4 --context-parallel-size 4"),
    "CP2 recompute": (2, "--micro-batch-size 4 --context-parallel-size 2 --recompute-granularity full"),
    "CP2 TP2": (4, "--micro-batch-size 4 --context-parallel-size 2 --tensor-model-parallel-size 2"),
    "CP2 TP2 SP": (
        4,
        "--micro-batch-size 4 --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "CP2 PP2": (4, "--micro-batch-size 4 --context-parallel-size 2 --pipeline-model-parallel-size 2"),
    "CP2 PP2 padded": (
        4,
        "--micro-batch-size 2 --context-parallel-size 2 --pipeline-model-parallel-size 2 --no-packing",
    ),
    "CP2 DP2": (4, "--micro-batch-size 2 --context-parallel-size 2"),
    "TP2 PP2": (4, "--micro-batch-size 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "TP2 PP2 SP": (
        4,
        "--micro-batch-size 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
    ),
    "TP2 DP2 SP": (4, "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2 DP2": (4, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def truth(llama: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Truth:
    hf, megatron = llama
    return Truth(hf=hf, megatron=megatron, data=write_dataset(tmp_path_factory.mktemp("data") / "data", hf))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_equal_hugging_faces_under(layout: str, truth: Truth, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    truth.assert_equal_under(world_size, flags, tmp_path)
