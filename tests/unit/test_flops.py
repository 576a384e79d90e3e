"""FLOPs against torch's own counter on a real model, and against the rule of six per weight."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.simulation import simulated_rank
from megatron_sppo import flops
from megatron_sppo.architecture import Architecture
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
    expected = flops.forward_flops(architecture, num_tokens=128, attended_positions=0, num_response_tokens=40)
    assert counted == expected


def test_long_documents_cost_what_their_pairs_cost() -> None:
    """Scores and values: 2 products of 2 FLOPs for each channel and pair; a causal document of 3 has 6 pairs."""
    assert flops.attended_positions(3) == 6
    one = flops.forward_flops(TINY, num_tokens=0, attended_positions=6, num_response_tokens=0)
    assert one == TINY.num_layers * 6 * 2 * 2 * TINY.num_attention_heads * TINY.kv_channels


def test_training_takes_about_six_flops_a_weight_and_token() -> None:
    """Llama-3-70B: 6 x 70.55e9 less the embedding's look-up, all tokens through the head; attention apart."""
    architecture = PUBLISHED["llama3-70b"]
    per_token = flops.training_flops(architecture, num_tokens=1, attended_positions=0, num_response_tokens=1)
    assert per_token == pytest.approx(6 * (70_553_706_496 - 128256 * 8192), rel=1e-4)


def test_crossover_length_of_a_published_model_and_of_a_mixture():
    """Llama-3-8B: 4096 (2 x 4096 + 2 x 1024 + 3 x 14336) / 4096 = 53,248. Of a mixture's experts two in each token."""
    shape = {
        "family": "llama",
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 5e5,
        "share_embeddings_and_output_weights": False,
    }
    assert flops.crossover_length(Architecture(**shape)) == 53248
    experts = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 14336}
    assert flops.crossover_length(Architecture(**shape, **experts)) == 53248 + 3 * 14336
