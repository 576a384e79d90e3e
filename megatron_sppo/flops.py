"""Floating-point operations of the model, by its shapes and the lengths of its documents. Pure Python.

A product [m, k] x [k, n] counts 2 m k n. Attention is causal within each document: a document of n tokens has
n (n + 1) / 2 pairs of positions that see each other, and each pair costs 4 FLOPs per channel of the queries (a score,
a weighted value). Norms, rotations, activations and the softmax are left out, as is usual.
"""

from typing import Any, TypeVar

from megatron_sppo.architecture import Architecture

Count = TypeVar("Count", int, Any)
"""An int, or an array of them."""

BACKWARD_FACTOR = 2
"""A product's backward pass takes two of its size: one for its input, one for its weight."""
FROZEN_BACKWARD_FACTOR = 1
"""Of a product with a weight that is not trained."""


def attended_positions(num_tokens: Count) -> Count:
    """Count the positions that all positions of a causal document see, themselves included -> n (n + 1) / 2."""
    return num_tokens * (num_tokens + 1) // 2


def layer_flops_per_token(architecture: Architecture, *, has_experts: bool) -> int:
    """Count the products of one layer for one token, forward, without attention's scores and values.

    Args:
        has_experts: of the layer; models may have both kinds.
    """
    return 2 * _weights_met(architecture, has_experts=has_experts)


def all_layers_flops_per_token(architecture: Architecture) -> int:
    """Count the same of all layers."""
    return sum(
        number * layer_flops_per_token(architecture, has_experts=has_experts)
        for has_experts, number in architecture.layer_kinds().items()
    )


_MATRICES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router", "gate")


def _weights_met(architecture: Architecture, *, has_experts: bool) -> int:
    """Count the weights of a layer's matrices that one token is multiplied with -> int."""
    weights = architecture.layer_weights(has_experts=has_experts)
    chosen = (architecture.moe_router_topk or 0) if has_experts else 1
    times = dict.fromkeys(("linear_fc1", "linear_fc2"), chosen)
    return sum(number * times.get(name, 1) for name, number in weights.items() if name.rpartition(".")[2] in _MATRICES)


def attention_flops_per_position(architecture: Architecture) -> int:
    """Count scores and weighted values of one layer for one pair of positions, forward."""
    return 4 * architecture.query_channels


def head_flops_per_token(architecture: Architecture) -> int:
    """Count the product with the output weight for one response token, forward."""
    return 2 * architecture.hidden_size * architecture.vocab_size


def forward_flops(
    architecture: Architecture, *, num_tokens: float, attended_positions: float, num_response_tokens: float
) -> float:
    """Count a forward pass of the whole model -> FLOPs.

    Args:
        num_tokens: real tokens, prompts included.
        attended_positions: the function of that name, summed over the documents.
        num_response_tokens: rows that reach the vocabulary.
    """
    attention = architecture.num_layers * attention_flops_per_position(architecture) * attended_positions
    products = all_layers_flops_per_token(architecture) * num_tokens
    return products + attention + head_flops_per_token(architecture) * num_response_tokens


def training_flops(
    architecture: Architecture,
    *,
    num_tokens: float,
    attended_positions: float,
    num_response_tokens: float,
    is_frozen: bool = False,
) -> float:
    """Count forward and backward of a training step, what is computed again left out (model FLOPs) -> FLOPs.

    Args:
        is_frozen: weights have no gradients, under adapters, whose own products (well below 1 %) are left out.
    """
    forward = forward_flops(
        architecture,
        num_tokens=num_tokens,
        attended_positions=attended_positions,
        num_response_tokens=num_response_tokens,
    )
    if not is_frozen:
        return (1 + BACKWARD_FACTOR) * forward
    attention = architecture.num_layers * attention_flops_per_position(architecture) * attended_positions
    return (1 + FROZEN_BACKWARD_FACTOR) * (forward - attention) + (1 + BACKWARD_FACTOR) * attention


def crossover_length(architecture: Architecture) -> float:
    """Say how many tokens a document has whose attention takes as long as all else of a layer -> tokens.

    Causal attention of a layer takes about 2 * n * d FLOPs a token forward (d = heads x head size) and its matrices
    take 2 * (weights of a layer that a token meets): they are equal at n = weights / d, 53,000 tokens for Llama-3-8B.
    """
    met = sum(
        number * (_weights_met(architecture, has_experts=has_experts) - _router(architecture, has_experts=has_experts))
        for has_experts, number in architecture.layer_kinds().items()
    )
    return met / (architecture.num_layers * architecture.query_channels)


def _router(architecture: Architecture, *, has_experts: bool) -> int:
    return architecture.layer_weights(has_experts=has_experts).get("router", 0)
