"""What latent attention keeps of a micro-batch (model/latent_attention.py), under either layer spec."""

from megatron_sppo.architecture import Architecture
from megatron_sppo.planning.frozen import Sizes

_FLOAT32 = 4


def latent_items(
    architecture: Architecture, sizes: Sizes, *, engine: bool, input_bytes: int, context_ranks: int
) -> dict[str, int]:
    """List what is kept between forward and backward, beside the norm before it -> {what: bytes}.

    The attention's own tensors, which recomputation leaves out, are in `latent_core`.

    Args:
        engine: Transformer Engine's spec; otherwise torch's.
        input_bytes: of an element of the projections' inputs; what makes latent vectors is no FP8.
        context_ranks: ranks whose keys and values are gathered; 1 where none are.
    """
    latent, narrow = architecture.latent_attention, sizes.type_bytes
    assert latent is not None
    ranks = [rank for rank in (latent.q_lora_rank, latent.kv_lora_rank) if rank is not None]
    # As the layer's norms of the torch spec, in `activations`.
    normed = sum(rank * (_FLOAT32 + narrow) + _FLOAT32 for rank in ranks)
    again = input_bytes if engine and latent.q_lora_rank is None and input_bytes != narrow else 0
    items = {
        "input of latent vectors": sizes.between * sizes.hidden * (narrow + again),
        "latent vectors": sizes.between * (normed + sum(ranks) * input_bytes),
        "queries, keys and values": sizes.tokens * narrow * (sizes.query + 2 * sizes.key * context_ranks),
        "input of linear_proj": sizes.tokens * sizes.heads * latent.v_head_dim * input_bytes,
    }
    if not engine:
        items["rotation"] = 4 * sizes.tokens * narrow * latent.qk_pos_emb_head_dim
    return items


def latent_core(sizes: Sizes) -> int:
    """Count what the core attention keeps beside its inputs -> bytes: its answer, and a float32 for each head.

    Values, and so the answer, are as wide as keys there.
    """
    return sizes.tokens * (sizes.query * sizes.type_bytes + sizes.heads * _FLOAT32)
