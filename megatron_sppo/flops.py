"""Floating-point operations of the model, by its shapes and the lengths of its documents. Pure Python.

A product [m, k] x [k, n] counts 2 m k n. Attention is causal within each document: a document of n tokens has
n (n + 1) / 2 pairs of positions that see each other, and each pair costs 2 FLOPs per channel of the queries (a score)
and 2 per channel of what they answer (a weighted value). Norms, rotations, activations and the softmax are left out, as
is usual.
"""

from typing import Any, TypeVar

from megatron_sppo.architecture import Architecture
from megatron_sppo.layer_parts import LayerKind
from megatron_sppo.weight_counts import layer_weights

Count = TypeVar("Count", int, Any)
"""An int, or an array of them."""

BACKWARD_FACTOR = 2
"""A product's backward pass takes two of its size: one for its input, one for its weight."""
FROZEN_BACKWARD_FACTOR = 1
"""Of a product with a weight that is not trained."""


def attended_positions(num_tokens: Count) -> Count:
    """Count the positions that all positions of a causal document see, themselves included -> n (n + 1) / 2."""
    return num_tokens * (num_tokens + 1) // 2


def layer_flops_per_token(architecture: Architecture, *, kind: LayerKind) -> int:
    """Count the products of one layer for one token, forward, without attention's scores and values.

    Args:
        kind: of the layer; models may have several.
    """
    return 2 * _weights_met(architecture, kind=kind) + (_delta_rule(architecture) if kind.has_delta_net else 0)


def all_layers_flops_per_token(architecture: Architecture) -> int:
    """Count the same of all layers."""
    return sum(
        number * layer_flops_per_token(architecture, kind=kind) for kind, number in architecture.layer_kinds().items()
    )


_LATENT = ("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
_MATRICES = ("linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2", "router", "gate", *_LATENT)
_DELTA_CHUNK = 64
"""Tokens that a gated delta net takes at once (model/delta_rule.py)."""


def _weights_met(architecture: Architecture, *, kind: LayerKind) -> int:
    """Count the weights of a layer's matrices that one token is multiplied with -> int."""
    weights = layer_weights(architecture, kind=kind)
    chosen = (architecture.moe_router_topk or 0) if kind.has_experts else 1
    times = dict.fromkeys(("linear_fc1", "linear_fc2"), chosen)
    return sum(number * times.get(name, 1) for name, number in weights.items() if name.rpartition(".")[2] in _MATRICES)


def _delta_rule(architecture: Architecture) -> int:
    """Count a gated delta net's own products for one token, in chunks of C (Yang et al. 2024, arXiv:2412.06464, 3.3).

    With heads of k and v channels: 4 C k within the chunk (keys and queries by keys), C (k + v) to solve a triangle of
    it, 2 C v to read it, 6 k v for the state: to predict, to read, to write.
    """
    net = architecture.delta_net
    assert net is not None
    key, value = net.linear_key_head_dim, net.linear_value_head_dim
    return net.linear_num_value_heads * (_DELTA_CHUNK * (5 * key + 3 * value) + 6 * key * value)


def attention_flops_per_position(architecture: Architecture) -> int:
    """Count scores and weighted values of one layer for one pair of positions, forward."""
    return 2 * (architecture.query_channels + architecture.context_channels)


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
    attention = architecture.num_attention_layers * attention_flops_per_position(architecture) * attended_positions
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
    attention = architecture.num_attention_layers * attention_flops_per_position(architecture) * attended_positions
    return (1 + FROZEN_BACKWARD_FACTOR) * (forward - attention) + (1 + BACKWARD_FACTOR) * attention


def crossover_length(architecture: Architecture) -> float:
    """Say how many tokens a document has whose attention takes as long as all else of a layer -> tokens.

    Causal attention of a layer takes about n * (d + v) FLOPs a token forward (d = heads x head size, v = heads x a
    value's size, mostly d) and its matrices take 2 * (weights of a layer that a token meets): they are equal at
    n = 2 * weights / (d + v), 53,000 tokens for Llama-3-8B.
    """
    met = sum(
        number * (_weights_met(architecture, kind=kind) - _router(architecture, kind=kind))
        for kind, number in architecture.layer_kinds().items()
    )
    return 4 * met / (architecture.num_attention_layers * attention_flops_per_position(architecture))


def _router(architecture: Architecture, *, kind: LayerKind) -> int:
    return layer_weights(architecture, kind=kind).get("router", 0)
