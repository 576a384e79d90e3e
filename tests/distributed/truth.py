"""Truth for the layout tests: Hugging Face's model under autograd, and how a world of ranks is held against it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_sppo.conversion.convert import export_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from tests.distributed.harness import run_ranks
from tests.distributed.worlds import save_gradient

ETA = 10.0
BASE = ["--params-dtype", "float32", "--lr", "1e-3", "--eta", str(ETA), "--global-batch-size", "16"]


@dataclass
class Truth:
    """A model in both forms, its data, and what Hugging Face makes of the first step; computed when first asked for."""

    hf: Path
    megatron: Path
    data: Path
    by_exported_names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    answers: dict[str, Any] = field(default_factory=dict)

    def assert_equal_under(self, world_size: int, flags: str, directory: Path) -> dict[str, Tensor]:
        """Run the first step in a layout and compare loss, log-probabilities and gradient -> the gradient, exported."""
        dataset = PreferenceDataset(self.data)
        results = run_ranks(
            save_gradient,
            world_size,
            str(self.megatron),
            str(self.data),
            reference_of(dataset),
            str(directory / "gradient"),
            [*BASE, *flags.split()],
        )
        first, answers = results[0], self.answers
        if not answers:
            answers["loss"], gradients, answers["log_probs"] = hugging_face_truth(self.hf, dataset, first["rows"])
            answers["gradients"] = self.by_exported_names(gradients)
            answers["weights"] = first["weights"]
        assert len(first["rows"]) == 16
        for result in results:  # every rank knows the whole batch's log-probabilities, and the model by its weights
            np.testing.assert_array_equal(result["log_prob"], first["log_prob"])
            assert result["weights"] == answers["weights"]
        np.testing.assert_allclose(first["log_prob"], answers["log_probs"], rtol=0, atol=5e-5)
        assert first["loss"] == pytest.approx(answers["loss"], rel=5e-6)
        exported = load_file(export_checkpoint(directory / "gradient", directory / "hf") / "model.safetensors")
        expected = {name: gradient for name, gradient in answers["gradients"].items() if name in exported}
        assert set(exported) == set(expected)
        for name, gradient in expected.items():
            difference = (exported[name] - gradient).abs().max().item()
            assert difference <= 2e-5 * max(1.0, gradient.abs().max().item()), f"{name} differs by {difference}"
        return exported


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
