"""Loss and gradient of a mixture of experts do not depend on the layout, as `test_layouts.py` shows for dense models.

Truth is Hugging Face's model under autograd again. Transformers keeps the experts of a layer in two tensors; their
gradients are compared under the per-expert names of the hub's files, which the converter exports.
Not shown here: CUDA, Transformer Engine's grouped experts, the alltoall dispatcher.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import BASE, hugging_face_truth, reference_of
from tests.distributed.worlds import save_gradient
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
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    root = tmp_path_factory.mktemp(request.param)
    hf = tiny_llama(root / "hf", num_hidden_layers=4, **MIXTURES[request.param])
    import_checkpoint(hf, root / "megatron")
    data = write_dataset(root / "data", hf)
    return {"family": request.param, "hf": hf, "megatron": root / "megatron", "data": data, "answers": {}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_equal_hugging_faces_under(layout: str, truth: dict, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    dataset = PreferenceDataset(truth["data"])
    results = run_ranks(
        save_gradient,
        world_size,
        str(truth["megatron"]),
        str(truth["data"]),
        reference_of(dataset),
        str(tmp_path / "gradient"),
        [*BASE, *flags.split()],
    )
    rows = results[0]["rows"]
    answers = truth["answers"]
    if "loss" not in answers:
        answers["loss"], gradients, answers["log_probs"] = hugging_face_truth(truth["hf"], dataset, rows)
        answers["gradients"] = by_hub_names(gradients, truth["family"])
    assert len(rows) == 16
    assert {result["weights"] for result in results} == {answers.setdefault("weights", results[0]["weights"])}
    np.testing.assert_allclose(results[0]["log_prob"], answers["log_probs"], rtol=0, atol=5e-5)
    assert results[0]["loss"] == pytest.approx(answers["loss"], rel=5e-6)
    exported = load_file(export_checkpoint(tmp_path / "gradient", tmp_path / "hf") / "model.safetensors")
    expected = {name: gradient for name, gradient in answers["gradients"].items() if name in exported}
    assert set(exported) == set(expected)
    assert sum(".experts." in name and bool(exported[name].any()) for name in exported) > 24  # of 4 x 4 x 3
    for name, gradient in expected.items():
        difference = (exported[name] - gradient).abs().max().item()
        assert difference <= 2e-5 * max(1.0, gradient.abs().max().item()), f"{name} differs by {difference}"
