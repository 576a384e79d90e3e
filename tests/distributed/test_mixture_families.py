"""Loss, log-probabilities and gradient of mixtures of other kinds than Qwen3's and Mixtral's (test_moe_layouts.py).

Shared experts with and without a gate, dense layers between and in front, routers that score by a sigmoid, choose by a
bias and from groups, gated delta nets or latent attention before them. Truth is Hugging Face's model under autograd.
The bias of a router comes out of a step as it went in, bit for bit. Not shown here: CUDA, Transformer Engine, FP8.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.conftest import all_layouts
from tests.distributed.layouts import (
    CP2,
    EP2,
    FOURS,
    FULL,
    PADDED,
    PP2_OF_THREE,
    SELECTIVE,
    SHARDED,
    SHARED_PROMPTS,
    SP,
    TP2,
)
from tests.distributed.truth import Truth, by_hub_names
from tests.families import MIXTURES, family_model

GATED, GLM, GROUPS = "qwen2_moe, dense between", "glm4_moe", "glm4_moe, biases, groups, two shared"
DENSE_BETWEEN = "qwen3_moe, dense between"
DELTA_NETS = "qwen3_next"
MOST_DELTA_NETS = "qwen3_5_moe_text"
HALVES = "deepseek_v3, halves, no groups"
LATENTS, DIRECT, BEST = "deepseek_v3", "deepseek_v2", "deepseek_v2, groups, all layers sparse"
BIAS = "e_score_correction_bias"

ALL = f"{FOURS} {PP2_OF_THREE} {TP2} {SP} {EP2}"

# Those of test_moe_layouts.py and test_family_gradients.py.
COVERED = ("mixtral", "qwen3_moe", "gpt_oss")
CASES = [
    (GATED, 2, f"{FOURS} {TP2} {SP}"),
    (GATED, 2, f"{FOURS} {EP2} {PADDED}"),
    (GATED, 4, f"{ALL} {FULL}"),
    (DELTA_NETS, 2, f"{FOURS} {TP2} {SP} {EP2}"),
    (MOST_DELTA_NETS, 2, f"{FOURS} {EP2}"),
    (HALVES, 2, f"{FOURS} {TP2} {SP}"),
    (LATENTS, 2, f"{FOURS} {CP2} {SELECTIVE}"),
    (LATENTS, 4, ALL),
    (DIRECT, 2, f"{FOURS} {TP2} {SP} {PADDED}"),
    (BEST, 2, f"{FOURS} {EP2}"),
    (LATENTS, 2, f"{SHARED_PROMPTS} {CP2}"),
    (GLM, 2, f"{FOURS} {TP2} {SP}"),
    (GLM, 2, f"{FOURS} {PP2_OF_THREE}"),
    (GLM, 2, f"{FOURS} {EP2}"),
    (GROUPS, 2, f"{FOURS} {CP2}"),
    (GROUPS, 4, f"{ALL} {SHARDED}"),
    *all_layouts(
        *(
            (family, ranks, f"{FOURS} {flags}")
            for family in MIXTURES
            if family not in COVERED
            for ranks, flags in (
                (1, PADDED),
                (2, PP2_OF_THREE),
                (2, EP2),
                (2, f"{EP2} {PADDED}"),
                (2, CP2),
                (2, f"{CP2} {PADDED}"),
                (2, f"{TP2} {SP}"),
                (4, f"{PP2_OF_THREE} {TP2} {SP} {EP2}"),
            )
        )
    ),
]

SHARED_WEIGHTS = {GATED: 4, "qwen2_moe": 12, DELTA_NETS: 12, MOST_DELTA_NETS: 12}
SHARED_WEIGHTS |= {GLM: 6, GROUPS: 9, LATENTS: 6, HALVES: 9, DIRECT: 6, BEST: 9}
"""Weights of shared experts in all sparse layers."""

BALANCE_COEFF, Z_COEFF = 3000.0, 200.0
ROUTER_LOSSES = f"--moe-aux-loss-coeff {BALANCE_COEFF} --moe-z-loss-coeff {Z_COEFF}"


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Truth]:
    """Mixtures by name in tests/families.py, each made when a layout first asks for it."""

    @cache
    def find(name: str, *, router_losses: bool = False, shares_prompts: bool = False) -> Truth:
        hf = family_model(tmp_path_factory.mktemp("mixture") / "hf", name, tie_word_embeddings=False)
        biases = {key: value for key, value in load_file(hf / "model.safetensors").items() if key.endswith(BIAS)}

        def named(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
            return by_hub_names(gradients, name) | biases

        def further(outputs: Any) -> Tensor:
            pairs = zip(outputs.router_logits, biases.values(), strict=True)
            return torch.stack([weighted_losses(logits, bias) for logits, bias in pairs]).sum()

        settings: dict[str, Any] = {}
        if router_losses:
            settings = {"further_loss": further, "one_rank": f"{FOURS} {ROUTER_LOSSES}"}
        if shares_prompts:  # global batches hold other responses
            settings["one_rank"] = SHARED_PROMPTS
        return Truth.of(hf, by_exported_names=named, **settings)

    return find


def weighted_losses(logits: Tensor, bias: Tensor) -> Tensor:
    """Weigh one layer's losses of one sequence: DeepSeek-V3 (arXiv:2412.19437), eq. 17 to 20, and the z loss.

    Two of E experts are chosen a token, by score and bias: balance = E / (2 T) sum_i (chosen_i / T) (sum_t s'_ti).
    """
    num_tokens, num_experts = logits.shape
    scores = logits.double().sigmoid()
    chosen = torch.zeros_like(scores).scatter(1, (scores + bias).topk(2, dim=1).indices, 1.0)
    share = num_experts / (2 * num_tokens) * chosen.sum(0)
    mean = (scores / scores.sum(1, keepdim=True)).sum(0) / num_tokens
    z = logits.double().logsumexp(1).square().mean()
    return BALANCE_COEFF * (share * mean).sum() + Z_COEFF * z


@pytest.mark.parametrize(("family", "world_size", "flags"), CASES)
def test_loss_and_gradient_equal_hugging_faces_and_biases_stay(
    family: str, world_size: int, flags: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    exported = truth_of(family, shares_prompts=SHARED_PROMPTS in flags).assert_equal_under(world_size, flags, tmp_path)
    original = load_file(truth_of(family).hf / "model.safetensors")
    biases = [name for name in exported if name.endswith(BIAS)]
    assert len(biases) == {GLM: 2, GROUPS: 3, LATENTS: 2, HALVES: 3}.get(family, 0)
    assert all(torch.equal(exported[name].view(torch.int32), original[name].view(torch.int32)) for name in biases)
    shared = [name for name in exported if ".shared_expert" in name]
    assert len(shared) == SHARED_WEIGHTS.get(family, 0)
    assert all(exported[name].any() for name in shared)


@pytest.mark.parametrize(("world_size", "flags"), [(1, FOURS), (4, ALL)])
def test_losses_of_sigmoid_routers_add_the_gradient_of_their_mean_over_sequences(
    world_size: int, flags: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    truth = truth_of(GLM, router_losses=True)
    exported = truth.assert_equal_under(world_size, f"{flags} {ROUTER_LOSSES}", tmp_path)
    plain = truth_of(GLM).hugging_face(truth.answers["one rank"]["rows"])["gradient"]
    routers = [name for name in exported if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2  # of three layers: the first is dense
    for name in routers:
        assert (exported[name] - plain[name]).norm() > 0.3 * plain[name].norm()
