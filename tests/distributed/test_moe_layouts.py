"""Loss and gradient of a mixture of experts do not depend on the layout, as `test_layouts.py` shows for dense models.

Truth is Hugging Face's model under autograd and one rank again. Transformers keeps the experts of a layer in two
tensors; their gradients are compared under the per-expert names of the hub's files, which the converter exports.
Not shown here: CUDA, Transformer Engine's grouped experts, the alltoall dispatcher.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.selection import training_index
from tests.distributed import layouts
from tests.distributed.layouts import (
    CP2,
    EP2,
    EP4,
    FOURS,
    FULL,
    OVERLAP,
    PADDED,
    PP2,
    SELECTIVE,
    SHARDED,
    SP,
    TP2,
    VPP2,
)
from tests.distributed.truth import (
    LOSS_BOUND,
    Truth,
    assert_same_gradient,
    by_hub_names,
    outputs_and_log_prob,
    reference_of,
)
from tests.models import MIXTURES, tiny_llama

COVER = {
    layouts.name(layout): layout
    for layout in layouts.pairwise_cover(layouts.MIXTURE, layouts.mixture_can_be, of=layouts.OF_MIXTURES)
}

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
    "EP2 sharded optimizer, overlapped": ("qwen3_moe", 2, 4, f"{EP2} {SHARDED} {OVERLAP}"),
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


BALANCE_COEFF, Z_COEFF = 3000.0, 200.0
ROUTER_LOSSES = f"--moe-aux-loss-coeff {BALANCE_COEFF} --moe-z-loss-coeff {Z_COEFF}"
"""As weighty beside eta = 1000 as the objective is for the routers: an error of scale cannot hide."""


def router_losses(outputs: Any) -> tuple[Tensor, Tensor]:
    """Sum one sequence's load-balancing and z losses over its layers, from Hugging Face's routers -> two scalars."""
    balance, z = torch.zeros(()), torch.zeros(())
    for logits in outputs.router_logits:
        num_tokens, num_experts = logits.shape
        scores = logits.double().softmax(1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(2, dim=1).indices, 1.0)
        share_of_tokens, mean_score = chosen.sum(0) / (2 * num_tokens), scores.sum(0) / num_tokens
        balance = balance + num_experts * (share_of_tokens * mean_score).sum()
        z = z + logits.double().logsumexp(1).square().mean()
    return balance, z


def weighted_router_losses(outputs: Any) -> Tensor:
    balance, z = router_losses(outputs)
    return BALANCE_COEFF * balance + Z_COEFF * z


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Truth]:
    """Mixtures by family, each made when a layout first asks for it."""

    @cache
    def find(family: str, *, router_losses: bool = False) -> Truth:
        hf = tiny_llama(tmp_path_factory.mktemp(family) / "hf", num_hidden_layers=4, **MIXTURES[family])
        further = {"further_loss": weighted_router_losses, "one_rank": f"{FOURS} {ROUTER_LOSSES}"}
        names = partial(by_hub_names, family=family)
        return Truth.of(hf, by_exported_names=names, **(further if router_losses else {}))

    return find


def assert_experts_learn(exported: dict[str, Tensor]) -> None:
    assert sum(".experts." in name and bool(exported[name].any()) for name in exported) > 24  # of 4 x 4 x 3


@pytest.mark.parametrize("layout", COVER)
def test_every_pair_of_choices_gives_the_loss_and_gradient_of_one_rank_and_of_hugging_face(
    layout: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    chosen = COVER[layout]
    truth = truth_of(chosen["model"])
    assert_experts_learn(truth.assert_equal_under(layouts.world_size(chosen), layouts.flags(chosen), tmp_path))


@pytest.mark.all_layouts
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradient_and_first_log_ratio_are_those_of_one_rank_and_of_hugging_face(
    layout: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    family, world_size, micro_batch_size, flags = LAYOUTS[layout]
    truth = truth_of(family)
    flags = f"--micro-batch-size {micro_batch_size} {flags}"
    assert_experts_learn(truth.assert_equal_under(world_size, flags, tmp_path))


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "flags"),
    [
        (1, 1, ""),
        (1, 16, FULL),
        (2, 4, f"{TP2} {SP}"),
        (2, 4, CP2),
        (2, 4, f"{PP2} {FULL}"),
        (2, 4, f"{EP2} {SHARDED}"),
        (4, 4, f"{EP2} {TP2} {CP2} {SP}"),
        (4, 2, f"{EP2} {VPP2} {FULL}"),
    ],
)
def test_router_losses_add_the_gradient_of_their_mean_over_sequences_and_nothing_to_the_loss(
    world_size: int, micro_batch_size: int, flags: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    """Hugging Face minimises the mean of SPPO's squares + the mean of the routers' losses, written out by hand."""
    truth = truth_of("qwen3_moe", router_losses=True)
    flags = f"--micro-batch-size {micro_batch_size} {flags} {ROUTER_LOSSES}"
    exported = truth.assert_equal_under(world_size, flags, tmp_path)
    plain = truth_of("qwen3_moe").hugging_face(truth.answers["one rank"]["rows"])["gradient"]
    routers = [name for name in exported if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    for name in routers:
        assert (exported[name] - plain[name]).norm() > 0.3 * plain[name].norm()


@pytest.mark.parametrize(("world_size", "flags"), [(1, FULL), (2, CP2), (4, f"{EP2} {VPP2}")])
def test_router_losses_beside_an_objective_of_pairs_are_meaned_over_sequences_too(
    world_size: int, flags: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    """Hugging Face minimises DPO's mean over pairs + the mean of the routers' losses over their sequences.

    With a tenth of the coefficients of SPPO's test: DPO's gradient is at most beta times that of a log-ratio.
    """
    truth = truth_of("qwen3_moe", router_losses=True)
    pairs = "--objective dpo --beta 30 --selection top-bottom:2 --micro-batch-size 2"
    coefficients = f"--moe-aux-loss-coeff {BALANCE_COEFF / 10} --moe-z-loss-coeff {Z_COEFF / 10}"
    found = truth.step(world_size, f"{flags} {pairs} {coefficients}", tmp_path)
    dataset, model = PreferenceDataset(truth.data), truth.hugging_face_model()
    index = training_index(dataset, "top-bottom:2", pairs=True)
    ratios, further = [], []
    for row in found["rows"]:
        group, k = int(index.group[row]), int(index.response[row])
        outputs, log_prob = outputs_and_log_prob(model, dataset.prompt(group), dataset.response(group, k))
        ratios.append(log_prob - float(reference_of(dataset)[group, k]))
        further.append(weighted_router_losses(outputs) / 10)
    ratio_w, ratio_l = torch.stack(ratios).view(-1, 2).unbind(1)
    loss = -torch.nn.functional.logsigmoid(30 * (ratio_w - ratio_l)).mean()
    assert found["loss"] == pytest.approx(loss.item(), rel=LOSS_BOUND)
    (loss + torch.stack(further).mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradient(found["gradient"], by_hub_names(gradients, family="qwen3_moe"))


def test_router_losses_are_reported_as_their_means_over_sequences_and_layers(truth_of: Callable[..., Truth]) -> None:
    truth = truth_of("qwen3_moe", router_losses=True)
    results = truth.run(4, f"--micro-batch-size 2 {EP2} {PP2} {FULL} {ROUTER_LOSSES}")
    further = truth.hugging_face(results[0]["rows"])["further"]  # of four layers
    for result in results:
        found = result["router_losses"]
        assert set(found) == {"moe/load_balancing_loss", "moe/z_loss"}
        weighted = BALANCE_COEFF * found["moe/load_balancing_loss"] + Z_COEFF * found["moe/z_loss"]
        assert 4 * weighted == pytest.approx(further, rel=1e-6)
        assert 1 <= found["moe/load_balancing_loss"] < 2
