"""What a gated delta net keeps and needs (model/delta_net.py): convolution and rule are computed again in backward.

T = tokens of a micro-batch on a context-parallel rank. Its heads are divided by those ranks, each of which sees all
tokens of the row: as much as all heads of its own tokens.
"""

from megatron_sppo.architecture import Architecture
from megatron_sppo.layer_parts import DELTA_CHUNK
from megatron_sppo.planning.frozen import Sizes

_FLOAT32 = 4


def delta_net_items(architecture: Architecture, sizes: Sizes, *, tensor_ranks: int, input_bytes: int) -> dict[str, int]:
    """List what is kept between forward and backward, beside the norm before it -> {what: bytes}.

    Args:
        input_bytes: of an element of the projections' inputs.
    """
    net, narrow = architecture.delta_net, sizes.type_bytes
    assert net is not None
    projected, value = net.projected_channels // tensor_ranks, net.value_channels // tensor_ranks
    heads = net.linear_num_value_heads // tensor_ranks
    return {
        "input of in_proj": sizes.between * sizes.hidden * input_bytes,
        "projected": sizes.tokens * (projected + 2 * heads) * narrow,
        # Of the norm of heads: the rule's outputs, the gate and its silu in float32, and two roundings.
        "norm of heads": sizes.tokens * (value * (3 * _FLOAT32 + 2 * narrow) + heads * _FLOAT32),
        "input of out_proj": sizes.tokens * value * input_bytes,
    }


def delta_net_working(architecture: Architecture, sizes: Sizes, *, tensor_ranks: int) -> int:
    """Count what convolution and rule keep when they are computed again, for a moment -> bytes.

    Of the rule, for each value head: five chunks of scores, six keys, three values and a part of a state. The gradients
    of one document at a time come to it, which are left out: most rows have several.
    """
    net = architecture.delta_net
    assert net is not None
    key, value = net.linear_key_head_dim, net.linear_value_head_dim
    rule = 5 * (DELTA_CHUNK + 1) + 6 * key + 3 * value + key * value // DELTA_CHUNK
    heads, mixed = net.linear_num_value_heads // tensor_ranks, net.mixed_channels // tensor_ranks
    return sizes.tokens * (heads * rule * _FLOAT32 + mixed * (3 * sizes.type_bytes + 2 * _FLOAT32))
