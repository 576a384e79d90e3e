"""How many weights a model has: in all, and in each kind of layer, as a rank holds them."""

from megatron_sppo.architecture import Architecture
from megatron_sppo.layer_parts import LayerKind

EXPERT_WEIGHTS = ("linear_fc1", "linear_fc2", "linear_fc1.bias", "linear_fc2.bias")
"""Names in `layer_weights` of what each expert has."""


def num_parameters(architecture: Architecture) -> int:
    """Count the weights as the checkpoint holds them, tied embeddings once -> int; routers' biases are weights."""
    embeddings = (
        architecture.vocab_size
        * architecture.hidden_size
        * (1 if architecture.share_embeddings_and_output_weights else 2)
    )
    biases = (
        architecture.num_expert_layers
        * (architecture.num_moe_experts or 0)
        * architecture.moe_router_enable_expert_bias
    )
    total = embeddings + architecture.hidden_size + biases
    for kind, layers in architecture.layer_kinds().items():
        copies = {"norm": architecture.norms_per_layer}
        if kind.has_experts:
            copies |= dict.fromkeys(EXPERT_WEIGHTS, architecture.num_moe_experts or 0)
        weights = layer_weights(architecture, kind=kind)
        total += layers * sum(number * copies.get(name, 1) for name, number in weights.items())
    return total


def layer_weights(
    architecture: Architecture, *, kind: LayerKind, tensor_ranks: int = 1, expert_tensor_ranks: int = 1
) -> dict[str, int]:
    """Count one layer's weights, kind by kind, as a rank holds them -> {Megatron's name: weights of one}.

    There are `norms_per_layer` of "norm"; with experts, linear_fc1 and linear_fc2 are those of one.

    Args:
        kind: of the layer; models may have several.
    """
    hidden = architecture.hidden_size
    attention = _attention_weights if architecture.latent_attention is None else _latent_weights
    mixer = _delta_net_weights if kind.has_delta_net else attention
    weights = {"norm": hidden, **mixer(architecture, tensor_ranks)}
    if not kind.has_experts:
        width = architecture.ffn_hidden_size // tensor_ranks
        return weights | _feed_forward_weights(architecture, width, has_experts=False)
    width = (architecture.moe_ffn_hidden_size or 0) // expert_tensor_ranks
    weights["router"] = (architecture.num_moe_experts or 0) * hidden
    if architecture.moe_shared_expert_intermediate_size is not None:
        shared = architecture.moe_shared_expert_intermediate_size // tensor_ranks
        weights |= {"shared_experts.linear_fc1": 2 * shared * hidden, "shared_experts.linear_fc2": hidden * shared}
    if architecture.moe_shared_expert_gate:
        weights["shared_experts.gate"] = hidden
    return weights | _feed_forward_weights(architecture, width, has_experts=True)


def _attention_weights(architecture: Architecture, tensor_ranks: int) -> dict[str, int]:
    """Count what attention has."""
    hidden, head = architecture.hidden_size, architecture.kv_channels
    queries = architecture.query_channels // tensor_ranks
    qkv = queries * (2 if architecture.attention_output_gate else 1) + 2 * architecture.key_channels // tensor_ranks
    weights = {"linear_proj": hidden * queries, "linear_qkv": hidden * qkv}
    if architecture.add_qkv_bias:
        weights["linear_qkv.bias"] = qkv
    if architecture.add_proj_bias:
        weights["linear_proj.bias"] = hidden
    if architecture.has_sinks:
        weights["softmax_offset"] = architecture.num_attention_heads // tensor_ranks
    if architecture.qk_layernorm:  # norms over all heads are held whole by each rank
        across = architecture.qk_layernorm_across_heads
        weights["q_layernorm"] = architecture.query_channels if across else head
        weights["k_layernorm"] = architecture.key_channels if across else head
    return weights


def _latent_weights(architecture: Architecture, tensor_ranks: int) -> dict[str, int]:
    """Count what latent attention has."""
    assert architecture.latent_attention is not None
    return architecture.latent_attention.weights(
        hidden=architecture.hidden_size, heads=architecture.num_attention_heads // tensor_ranks
    )


def _delta_net_weights(architecture: Architecture, tensor_ranks: int) -> dict[str, int]:
    """Count what a gated delta net has; its norm is of one value head, and each rank holds it."""
    net = architecture.delta_net
    assert net is not None
    heads = net.linear_num_value_heads // tensor_ranks
    return {
        "in_proj": architecture.hidden_size * net.projected_channels // tensor_ranks,
        "conv1d": net.mixed_channels // tensor_ranks * net.linear_conv_kernel_dim,
        "A_log": heads,
        "dt_bias": heads,
        "head_norm": net.linear_value_head_dim,
        "out_proj": architecture.hidden_size * net.value_channels // tensor_ranks,
    }


def _feed_forward_weights(architecture: Architecture, width: int, *, has_experts: bool) -> dict[str, int]:
    """Count what a feed-forward unit of so many channels has, or one expert of a layer, and its router's bias."""
    hidden = architecture.hidden_size
    biases: dict[str, int] = {}
    if architecture.add_mlp_bias:
        biases = {"linear_fc1.bias": 2 * width, "linear_fc2.bias": hidden}
        biases |= {"router.bias": architecture.num_moe_experts or 0} if has_experts else {}
    return biases | {"linear_fc1": 2 * width * hidden, "linear_fc2": hidden * width}
