"""Truth for the layout tests: Hugging Face's model under autograd, and how a world of ranks is held against it.

Hugging Face's weights are widened to float64, so that the rounding of its matrix products and of its sums is not ours
to explain; its norms and its softmax stay in float32, as its code has them, but in models with gated delta nets, whose
gradients are of float64 alone (`InFloat64`). What remains follows from float32's 2^-24:

- log pi of at most 128 nats is rounded to float32 once (3.8e-6), its 24 terms carry 1e-6 together: LOG_PROB_BOUND.
- Residuals are some 50 nats (eta as published), so a squared one moves by 2 * 5e-6 / 50 or 2e-7 of itself; a small one
  moves by more and weighs less in the mean: LOSS_BOUND, relative. (At eta 10 residuals of 3 nats allowed 5e-6 only.)
- A weight's gradient comes through about 60 matrix products in a row (four layers, forward and backward), each of
  which rounds by some 2^-24 * 5 in the root mean square: 2^-24 * 5 * sqrt(60), 2.3e-6 of the tensor's largest entry.
  Found: 1.2e-6 to 2.9e-6. GRADIENT_BOUND is relative to the largest entry.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import FOURS
from tests.distributed.worlds import first_step

ETA = 1000.0
NUM_ROWS = 16
BASE = ["--params-dtype", "float32", "--lr", "1e-3", "--eta", str(ETA), "--global-batch-size", str(NUM_ROWS)]

LOG_PROB_BOUND = 1e-5
LOSS_BOUND = 1e-6
GRADIENT_BOUND = 1e-5
SINK_BOUND = 5e-5
"""Of a sink's gradient: a sum over all queries of either sign. Its float32 error was 2e-6 to 1.4e-5, by the CPU."""
DECAY_NOISE = 4.0
"""Times what Hugging Face's own float32 rule loses against float64, for a gated delta net's decays and rates: sums over
all tokens whose terms mostly cancel each other. Found on one rank: Hugging Face's, whose products are float64, is off
by 2.5e-5 to 6.2e-5 of a large sum and 4.4e-4 of a small one, ours by 2.6e-5 to 6.7e-5 and 5.2e-4: at most 1.2 times as
much. Norms have an epsilon of 0.1 there. With 1e-6 Hugging Face's is off by 8e-5 in all other tensors too: a norm makes
noise of next to nothing, in which a fault of ours would not be seen."""
_DECAYS = (".A_log", ".dt_bias", ".in_proj_a.weight", ".in_proj_b.weight", ".in_proj_ba.weight")


@dataclass
class Truth:
    """A model in both forms, its data, and what Hugging Face makes of the first step; computed when first asked for."""

    hf: Path
    megatron: Path
    data: Path
    by_exported_names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    further_loss: Callable[[Any], Tensor] | None = None
    """Of Hugging Face's outputs for one sequence; meaned over sequences and minimised too, but no part of `loss`."""
    one_rank: str = FOURS
    """Flags of our own truth on one rank."""
    launch: Callable[..., list[dict[str, Any]]] = run_ranks
    """Runs a function of so many ranks."""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, hf: Path, **settings: Any) -> Self:
        """Import a model, and write judged responses for it, beside its directory -> its truth, settings as above."""
        import_checkpoint(hf, hf.parent / "megatron")
        return cls(hf, hf.parent / "megatron", write_dataset(hf.parent / "data", hf), **settings)

    def assert_equal_under(self, world_size: int, flags: str, directory: Path) -> dict[str, Tensor]:
        """Run the first step in a layout and hold it against Hugging Face and one rank -> its gradient, exported.

        On every rank the log-ratio is zero where the reference pass and training meet: no step has been made.
        """
        if "one rank" not in self.answers:
            self.answers["one rank"] = self.step(1, self.one_rank, directory / "one_rank")
        one_rank = self.answers["one rank"]
        found = self.step(world_size, flags, directory / "layout")
        assert found["weights"] == one_rank["weights"]
        noise = self.hugging_face(found["rows"]).get("noise", {})
        for truth in (one_rank, self.hugging_face(found["rows"])):
            np.testing.assert_array_equal(found["rows"], truth["rows"])
            # Sums over a response are rounded to float32, whose steps are longer than the bound from 128 nats on.
            step = float(np.finfo(np.float32).eps)
            np.testing.assert_allclose(found["log_prob"], truth["log_prob"], rtol=step, atol=LOG_PROB_BOUND)
            assert found["loss"] == pytest.approx(truth["loss"], rel=LOSS_BOUND)
            assert_same_gradient(found["gradient"], truth["gradient"], noise=noise)
        return found["gradient"]

    def step(self, world_size: int, flags: str, directory: Path) -> dict[str, Any]:
        """Run the first step on ranks that agree with each other -> rank 0's answer, with the exported gradient."""
        results = self.run(world_size, flags, save=directory / "gradient")
        for result in results:  # every rank knows the whole batch's log-probabilities, and the model by its weights
            np.testing.assert_array_equal(result["log_prob"], results[0]["log_prob"])
            assert result["weights"] == results[0]["weights"]
            assert result["log_ratio"] == 0
        assert len(results[0]["rows"]) == NUM_ROWS
        exported = export_checkpoint(directory / "gradient", directory / "hf") / "model.safetensors"
        return {**results[0], "gradient": load_file(exported)}

    def run(self, world_size: int, flags: str, *, save: Path | None = None) -> list[dict[str, Any]]:
        """Run `first_step` in a layout -> its results by rank."""
        dataset = PreferenceDataset(self.data)
        arguments = (str(self.megatron), str(self.data), reference_of(dataset), None if save is None else str(save))
        return self.launch(first_step, world_size, *arguments, [*BASE, *flags.split()])

    def hugging_face(self, rows: np.ndarray) -> dict[str, Any]:
        """Compute loss, log-probabilities and gradient of the given rows of the "all" index -> as `first_step` has it.

        (3.6) written out, one unpadded sequence at a time: the mean over responses of
        (log pi_theta - reference - eta (w - 1/2))^2.
        """
        if "Hugging Face" not in self.answers:
            self.answers["Hugging Face"] = self._hugging_face(rows)
        return self.answers["Hugging Face"]

    def _hugging_face(self, rows: np.ndarray) -> dict[str, Any]:
        dataset, model = PreferenceDataset(self.data), self.hugging_face_model()
        found = self._of_model(model, dataset, rows)
        if not any(name.endswith(_DECAYS) for name in found["gradient"]):
            return found
        model.zero_grad()
        with in_float64():
            exact = self._of_model(model, dataset, rows)
        decays = {name: value for name, value in exact["gradient"].items() if name.endswith(_DECAYS)}
        noise = {name: (found["gradient"][name] - value).abs().max().item() for name, value in decays.items()}
        return {**found, "gradient": exact["gradient"], "noise": noise}

    def hugging_face_model(self) -> Any:
        """Load Hugging Face's model, its weights widened to float64."""
        from transformers import AutoModelForCausalLM

        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = load_pretrained(AutoModelForCausalLM, self.hf, dtype=torch.float64, **eager)
        model.config.output_router_logits = self.further_loss is not None
        return model

    def _of_model(self, model: Any, dataset: PreferenceDataset, rows: np.ndarray) -> dict[str, Any]:
        log_probs, residuals, further = [], [], []
        for group, k in (divmod(int(row), dataset.num_responses) for row in rows):
            prompt, response = dataset.prompt(group), dataset.response(group, k)
            outputs, log_prob = outputs_and_log_prob(model, prompt, response)
            log_probs.append(log_prob)
            further.append(torch.zeros(()) if self.further_loss is None else self.further_loss(outputs))
            target = ETA * (float(dataset.win_rates(group)[k]) - 0.5)
            residuals.append(log_probs[-1] - float(reference_of(dataset)[group, k]) - target)
        loss = torch.stack(residuals).square().mean()
        (loss + torch.stack(further).mean()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {
            "rows": rows,
            "loss": loss.item(),
            "log_prob": torch.stack(log_probs).detach().numpy(),
            "further": torch.stack(further).mean().item(),
            "gradient": self.by_exported_names(gradients),
        }


def by_hub_names(gradients: dict[str, Tensor], family: str) -> dict[str, Tensor]:
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


class InFloat64(TorchFunctionMode):
    """Lets a model whose weights are float64 compute in it alone, where its code asks for float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        given = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*(_wide(value) for value in args), **given)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Compute in float64 for the block, new tensors too."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(usual)


def assert_same_gradient(
    found: Mapping[str, Tensor], truth: Mapping[str, Tensor], *, noise: Mapping[str, float] | None = None
) -> None:
    """Compare every tensor that was exported; where weights are tied, Hugging Face names some twice.

    Args:
        noise: what float32 costs of some tensors in Hugging Face's own model, at the worst entry.
    """
    missing = set(found) - set(truth)
    assert not missing, f"{missing} have no gradient in truth"
    for name, gradient in found.items():
        scale = truth[name].abs().max().item()
        difference = (gradient - truth[name]).abs().max().item()
        share = SINK_BOUND if name.endswith(".sinks") else GRADIENT_BOUND
        bound = share * scale + DECAY_NOISE * (noise or {}).get(name, 0.0)
        assert difference <= bound, f"{name} differs by {difference / (scale or 1):.1e} of {scale:.3g}"


def outputs_and_log_prob(model: Any, prompt: np.ndarray, response: np.ndarray) -> tuple[Any, Tensor]:
    """Run a sequence through the model -> (its outputs, summed log pi of the response's tokens: scalar float64)."""
    tokens = torch.tensor([[*prompt, *response]], dtype=torch.long)
    outputs = model(tokens)
    log_p = outputs.logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    return outputs, log_p.gather(1, tokens[0, len(prompt) :, None]).sum()


def reference_of(dataset: PreferenceDataset) -> np.ndarray:
    """Any numbers will do for log pi_t; these leave log-ratios of a few nats -> [G, K]."""
    generator = np.random.default_rng(3)
    lengths = dataset.response_lengths
    return (-5.5 * lengths + generator.normal(size=lengths.shape)).astype(np.float32)
