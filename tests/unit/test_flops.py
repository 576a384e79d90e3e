"""FLOPs against torch's own counter on a real model, and against the rule of six per weight."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.simulation import simulated_rank
from megatron_sppo import flops
from megatron_sppo.model import gpt
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.planning.architectures import PUBLISHED
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.policy import build_policy
from tests.unit.planning.models import MIXTURE, TINY


@pytest.mark.parametrize("fields", [{}, {"qk_layernorm": True}, MIXTURE], ids=["dense", "norms", "mixture"])
def test_products_of_a_forward_pass_are_those_that_torch_counts(fields: dict) -> None:
    """Attention is left out here: torch counts all pairs of a causal product, half of which are never computed."""
    architecture = dataclasses.replace(TINY, **fields)
    with simulated_rank(ParallelConfig(), rank=0, world_size=1):
        policy = build_policy(architecture, ModelConfig(params_dtype="float32"), ParallelConfig())
        tokens = torch.arange(128)[None]
        boundaries = torch.tensor([0, 128], dtype=torch.int32)
        response = gpt.ResponseTokens(torch.arange(40), torch.zeros(40, dtype=torch.int64))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            gpt.forward(policy.chunks[0], tokens, tokens, cu_seqlens=boundaries, max_seqlen=128, response=response)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(number for operator, number in counts.items() if "attention" not in str(operator))
    expected = flops.forward_flops(architecture, num_tokens=128, num_pairs=0, num_response_tokens=40)
    assert counted == expected


def test_long_documents_cost_what_their_pairs_cost() -> None:
    """Scores and values: 2 products of 2 FLOPs for each channel and pair; a causal document of 3 has 6 pairs."""
    assert flops.attended_pairs(3) == 6
    one = flops.forward_flops(TINY, num_tokens=0, num_pairs=6, num_response_tokens=0)
    assert one == TINY.num_layers * 6 * 2 * 2 * TINY.num_attention_heads * TINY.kv_channels


def test_training_takes_about_six_flops_a_weight_and_token() -> None:
    """Llama-3-70B: 6 x 70.55e9 less the embedding's look-up, all tokens through the head; attention apart."""
    architecture = PUBLISHED["llama3-70b"]
    per_token = flops.training_flops(architecture, num_tokens=1, num_pairs=0, num_response_tokens=1)
    assert per_token == pytest.approx(6 * (70_553_706_496 - 128256 * 8192), rel=1e-4)
