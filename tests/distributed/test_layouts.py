"""Loss and gradient do not depend on the layout (ALGORITHM.md, section 4.4).

Truth is Hugging Face's model under autograd, one unpadded sequence at a time, with the loss written out as
(3.6): mean over responses of (log pi_theta - reference - eta (w - 1/2))^2. Each layout's gradient is saved in the
weights' place, exported by the converter, and compared by Hugging Face's names, so the head, every collective,
finalize_model_grads and the converter stand or fall together. Real gloo ranks; the float32 tolerances are stated below.
Not shown here: CUDA, Transformer Engine, FP8.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_sppo.conversion.convert import export_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.worlds import save_gradient

ETA = 10.0
BASE = ["--params-dtype", "float32", "--lr", "1e-3", "--eta", str(ETA), "--global-batch-size", "16"]

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


def reference_of(dataset: PreferenceDataset) -> np.ndarray:
    """Any numbers will do for log pi_t; these leave residuals of a few nats -> [G, K]."""
    generator = np.random.default_rng(3)
    lengths = dataset.response_lengths
    return (-5.5 * lengths + generator.normal(size=lengths.shape)).astype(np.float32)


def hugging_face_truth(
    hf: Path, dataset: PreferenceDataset, rows: np.ndarray
) -> tuple[float, dict[str, torch.Tensor], list[float]]:
    """Compute loss and gradient of the given rows of the "all" index -> (loss, {name: gradient}, log-probs)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    reference = reference_of(dataset)
    losses, log_probs = [], []
    for row in rows:
        group, k = divmod(int(row), dataset.num_responses)
        prompt, response = dataset.prompt(group), dataset.response(group, k)
        tokens = torch.tensor([[*prompt, *response]], dtype=torch.long)
        log_p = model(tokens).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        log_prob = log_p.gather(1, tokens[0, len(prompt) :, None]).sum()
        target = ETA * (float(dataset.win_rates(group)[k]) - 0.5)
        losses.append((log_prob - float(reference[group, k]) - target).square())
        log_probs.append(float(log_prob))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), gradients, log_probs


@pytest.fixture(scope="module")
def truth(llama: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    hf, megatron = llama
    data = write_dataset(tmp_path_factory.mktemp("data") / "data", hf)
    return {"hf": hf, "megatron": megatron, "data": data, "answers": {}}


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
        answers["loss"], answers["gradients"], answers["log_probs"] = hugging_face_truth(truth["hf"], dataset, rows)
    assert len(rows) == 16
    assert {result["weights"] for result in results} == {answers.setdefault("weights", results[0]["weights"])}
    for result in results:  # every rank knows the whole batch's log-probabilities
        np.testing.assert_array_equal(result["log_prob"], results[0]["log_prob"])
    np.testing.assert_allclose(results[0]["log_prob"], answers["log_probs"], rtol=0, atol=5e-5)
    assert results[0]["loss"] == pytest.approx(answers["loss"], rel=5e-6)
    exported = load_file(export_checkpoint(tmp_path / "gradient", tmp_path / "hf") / "model.safetensors")
    expected = {name: gradient for name, gradient in answers["gradients"].items() if name in exported}
    assert set(exported) == set(expected)
    for name, gradient in expected.items():
        difference = (exported[name] - gradient).abs().max().item()
        assert difference <= 2e-5 * max(1.0, gradient.abs().max().item()), f"{name} differs by {difference}"
