"""What autograd keeps of one micro-batch, tensor by tensor, under either layer spec and every kind of recomputation.

The torch spec's lists are held against a real forward pass (tests/unit/planning/test_activations.py); those of
Transformer Engine are read from its modules (2.11) and megatron-core's fused functions, and are computed only; so is
what FlexAttention keeps where it takes the engine's place (model/attention.py).

T = tokens of a micro-batch on a context-parallel rank, n = tokens of a rank between the layers' products (T / TP under
sequence parallelism), H = hidden size, q and k = query and key channels of a rank, F = feed-forward channels of a rank,
e = bytes of the activations' type, R = response tokens.
"""

from dataclasses import dataclass

from megatron_sppo.architecture import Architecture
from megatron_sppo.layer_parts import LayerKind
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.planning.delta_net import delta_net_items, delta_net_working
from megatron_sppo.planning.frozen import Sizes, with_adapters
from megatron_sppo.planning.latents import latent_core, latent_items
from megatron_sppo.planning.parameters import Grid

FLOAT32 = 4
FP8 = 1


@dataclass(frozen=True, kw_only=True)
class MicroBatchShape:
    """One micro-batch as a rank sees it."""

    num_tokens: int
    """T, padding included."""
    num_response_tokens: int
    """R of this context-parallel rank."""
    sum_of_squares: int
    """Squared lengths of the whole row's documents, added up: what a mask of a document against itself takes. Of one
    that continues a shared prompt: its length times that of both."""
    num_path_keys: int = 0
    """Where prompts are shared: lengths of all documents that continue one, each with the prompt, added up."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a rank keeps between a micro-batch's forward and backward pass."""

    layer: dict[str, int]
    """Of one layer, by what it is."""
    recomputed: int
    """Of one layer while it is computed again, beyond what is kept of it."""
    first: int
    """Before the layers, where the stage has the embedding."""
    last: int
    """After the layers, where the stage has the head."""
    working: int
    """Most that the backward pass of a layer needs beside what is kept."""

    @property
    def per_layer(self) -> int:
        """Bytes of one layer."""
        return sum(self.layer.values())


def activations(
    architecture: Architecture,
    model: ModelConfig,
    grid: Grid,
    shape: MicroBatchShape,
    *,
    engine: bool,
    kind: LayerKind,
) -> Activations:
    """Add up what is kept of one micro-batch -> Activations.

    Args:
        engine: Transformer Engine's spec (CUDA); otherwise torch's (CPU).
        kind: of the layer; models may have several.
    """
    parallel, tensor = grid.parallel, grid.parallel.tensor_model_parallel_size
    if kind.has_experts:
        width = (architecture.moe_ffn_hidden_size or 0) // parallel.expert_tensor_parallel_size
    else:
        width = architecture.ffn_hidden_size // tensor
    sizes = Sizes(
        tokens=shape.num_tokens,
        between=shape.num_tokens // (tensor if parallel.sequence_parallel else 1),
        hidden=architecture.hidden_size,
        query=architecture.query_channels // tensor,
        key=architecture.key_channels // tensor,
        head=architecture.kv_channels,
        heads=architecture.num_attention_heads // tensor,
        width=width,
        shared=(architecture.moe_shared_expert_intermediate_size or 0) // tensor if kind.has_experts else 0,
        has_experts=kind.has_experts,
        type_bytes=model.type_bytes,
    )

    def items(*, recompute: bool) -> dict[str, int]:
        product_bytes = FP8 if engine and model.fp8 != "none" else sizes.type_bytes
        if kind.has_delta_net:
            found = delta_net_items(architecture, sizes, tensor_ranks=tensor, input_bytes=product_bytes)
        elif architecture.latent_attention is not None:
            gathers = not engine or _takes_flex(architecture, grid, shape)
            found = latent_items(
                architecture,
                sizes,
                engine=engine,
                input_bytes=product_bytes,
                context_ranks=parallel.context_parallel_size if gathers else 1,
            )
            if not recompute:
                found["attention"] = latent_core(sizes)
                found |= {} if engine else _of_documents(grid, shape, sizes)
        else:
            mixer = _engine_attention if engine else _torch_attention
            found = mixer(architecture, model, grid, shape, sizes, recompute=recompute)
        norm = _engine_norm(sizes) if engine else _torch_norm(sizes)
        found["norms"] = architecture.norms_per_layer * sum(norm.values())
        feed_forward = _engine_feed_forward if engine else _torch_feed_forward
        found |= feed_forward(architecture, grid, sizes, product_bytes=product_bytes)
        if grid.adapters is None:
            return found
        return with_adapters(found, architecture, grid, sizes, engine=engine, is_fp8=model.fp8 != "none")

    whole = items(recompute=False)
    kept = whole
    if model.recompute_granularity == "selective":
        kept = items(recompute=True)
    elif model.recompute_granularity == "full":
        kept = {"layer input": sizes.residual}
    kept_bytes, whole_bytes = sum(kept.values()), sum(whole.values())
    norm = sum(_engine_norm(sizes).values()) if engine else sum(_torch_norm(sizes).values())
    if grid.adapters is not None and not engine:
        norm -= sizes.residual  # kept for its weight's gradient alone
    working = _working(
        sizes,
        engine=engine,
        gathered_keys=parallel.context_parallel_size if _takes_flex(architecture, grid, shape) else 0,
    )
    if kind.has_delta_net:
        working = max(working, delta_net_working(architecture, sizes, tensor_ranks=tensor))
    rows = shape.num_response_tokens * (sizes.hidden * sizes.type_bytes + 2 * 8 + 2 * FLOAT32)
    return Activations(
        layer=kept,
        recomputed=whole_bytes - kept_bytes,
        first=shape.num_tokens * (8 + (tensor > 1)),
        last=norm + rows,
        working=working,
    )


def _takes_flex(architecture: Architecture, grid: Grid, shape: MicroBatchShape) -> bool:
    """Tell whether FlexAttention takes Transformer Engine's place (model/layer_spec.py, model/attention.py)."""
    windows_across_ranks = architecture.sliding_window is not None and grid.parallel.context_parallel_size > 1
    by_scores = architecture.attention_softcap is not None or architecture.has_sinks
    return shape.num_path_keys > 0 or by_scores or windows_across_ranks


def _working(sizes: Sizes, *, engine: bool, gathered_keys: int) -> int:
    """Estimate the backward pass's own tensors: gradients of a layer's widest part, and of the residual stream.

    Args:
        gathered_keys: ranks whose keys and values FlexAttention has gradients of; 0 where it is not used.
    """
    if engine:
        gathered = sizes.tokens * sizes.hidden * sizes.type_bytes
        dense = 3 * sizes.residual + gathered + 3 * sizes.tokens * max(sizes.width, sizes.shared) * sizes.type_bytes
        # Gradients of queries, of keys and values as they are seen and as they are returned to their ranks.
        attention = sizes.tokens * (2 * sizes.query + 4 * sizes.key * gathered_keys) * sizes.type_bytes
        return max(dense, attention + 2 * sizes.residual) if gathered_keys else dense
    # The norm's backward pass has four float32 tensors of the residual's size at one time.
    norm = 4 * sizes.between * sizes.hidden * FLOAT32
    return max(norm, 2 * sizes.residual + 2 * sizes.tokens * max(sizes.width, sizes.shared) * sizes.type_bytes)


def _torch_norm(sizes: Sizes) -> dict[str, int]:
    """model/normalization.py keeps the float32 input, the scale and the normalised input."""
    return {"norm": sizes.between * (sizes.hidden * (FLOAT32 + sizes.type_bytes) + FLOAT32)}


def _torch_attention(
    architecture: Architecture,
    model: ModelConfig,
    grid: Grid,
    shape: MicroBatchShape,
    sizes: Sizes,
    *,
    recompute: bool,
) -> dict[str, int]:
    """List what attention of the torch spec keeps -> {what: bytes}."""
    context = grid.parallel.context_parallel_size
    wide = sizes.tokens * sizes.type_bytes
    items = {
        "input of linear_qkv": sizes.residual,
        "rotation": 4 * wide * sizes.head,
        # Values are a view of the projection's output, which is kept whole for them.
        "queries, keys and values": wide * (2 * sizes.query + 3 * sizes.key),
        "input of linear_proj": wide * sizes.query,
    }
    capped = architecture.attention_softcap is not None or architecture.has_sinks
    if context > 1:
        # Keys and values of all ranks, gathered and put in order, in place of the views; soft caps repeat them anyway.
        items["queries, keys and values"] = wide * (sizes.query + (0 if capped else 2 * sizes.key * context))
    if not recompute:
        items["attention"] = wide * sizes.query + sizes.tokens * sizes.heads * FLOAT32
        if capped:
            items["attention"] = _capped_attention(shape, sizes, context=context)
        else:
            items |= _of_documents(grid, shape, sizes)
    if architecture.qk_layernorm:
        channels, norms = sizes.query + sizes.key, sizes.heads + sizes.key // sizes.head
        items["norms of queries and keys"] = sizes.tokens * (channels * (FLOAT32 + sizes.type_bytes) + norms * FLOAT32)
    if architecture.attention_output_gate:
        items["gate"] = sizes.tokens * sizes.query * (FLOAT32 + sizes.type_bytes)
    return items


def _of_documents(grid: Grid, shape: MicroBatchShape, sizes: Sizes) -> dict[str, int]:
    """List what attention of the torch spec keeps of documents that see others, or are divided -> {what: bytes}."""
    context, shared = grid.parallel.context_parallel_size, shape.num_path_keys > 0
    masks = shape.sum_of_squares // context * sizes.type_bytes if context > 1 or shared else 0
    # Keys and values are laid out anew for each document that continues another.
    return {"masks": masks, "keys and values of paths": 2 * shape.num_path_keys * sizes.key * sizes.type_bytes}


def _torch_feed_forward(architecture: Architecture, grid: Grid, sizes: Sizes, *, product_bytes: int) -> dict[str, int]:
    """List what a feed-forward unit of the torch spec keeps -> {what: bytes}."""
    assert product_bytes == sizes.type_bytes
    if not sizes.has_experts:
        # Gate and up, silu(gate), up + 0 (megatron-core 0.16.1 and 0.19.2, mlp.py adds an offset), their product.
        return {"feed-forward": sizes.residual + sizes.tokens * sizes.type_bytes * 5 * sizes.width}
    return _torch_experts(architecture, grid, sizes)


def _capped_attention(shape: MicroBatchShape, sizes: Sizes, *, context: int) -> int:
    """Count what soft-capped attention keeps (model/attention.py): keys and values repeated, scores three times, masks.

    The scores' hyperbolic tangent, their float32 softmax, and that in the activations' type where it is another.
    """
    scores = shape.sum_of_squares // context
    weights = sizes.type_bytes if sizes.type_bytes != FLOAT32 else 0
    keys = sizes.tokens * context
    if shape.num_path_keys > 0:  # those of prompts once, and again with each response
        keys = shape.num_path_keys + (sizes.tokens - shape.num_response_tokens) * context
    repeated = 2 * keys * sizes.query * sizes.type_bytes
    return repeated + scores * (sizes.heads * (sizes.type_bytes + FLOAT32 + weights) + 1)


def _torch_experts(architecture: Architecture, grid: Grid, sizes: Sizes) -> dict[str, int]:
    """List what a mixture keeps on the CPU: of tokens of all ranks, their routes and the experts' tensors."""
    parallel = grid.parallel
    experts, chosen = architecture.num_moe_experts or 0, architecture.moe_router_topk or 0
    gathered = sizes.between * parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    routed = gathered * chosen // parallel.expert_model_parallel_size  # to the experts here, where all are as busy
    local = experts // parallel.expert_model_parallel_size
    shared = 5 * sizes.tokens * sizes.shared * sizes.type_bytes  # as in a dense layer; its input is the router's
    if architecture.moe_shared_expert_gate:
        shared += sizes.residual + sizes.between * sizes.type_bytes
    return {
        "shared experts": shared,
        "router": sizes.residual + sizes.between * chosen * (8 + FLOAT32),
        "routes": gathered * local * (1 + FLOAT32) + routed * (8 + FLOAT32),
        # As in a dense layer, and the product once more: weighed by the router.
        "experts": routed * (sizes.hidden + 6 * sizes.width) * sizes.type_bytes,
    }


def _engine_norm(sizes: Sizes) -> dict[str, int]:
    """Transformer Engine's RMSNorm keeps its input and the reciprocal root."""
    return {"norm": sizes.residual + sizes.between * FLOAT32}


def _engine_attention(
    architecture: Architecture,
    model: ModelConfig,
    grid: Grid,
    shape: MicroBatchShape,
    sizes: Sizes,
    *,
    recompute: bool,
) -> dict[str, int]:
    """List what attention of Transformer Engine's spec keeps -> {what: bytes}.

    Under FP8 the inputs of products are kept in one byte an element; queries, keys, values and the attention's output
    stay in bfloat16 (no FP8 attention), and so do the residual stream and the activation's input.
    """
    product_bytes = FP8 if model.fp8 != "none" else sizes.type_bytes
    wide, normed = sizes.tokens * sizes.type_bytes, sizes.between * sizes.hidden * product_bytes
    items = {
        "input of linear_qkv": normed,
        "queries, keys and values": wide * (2 * sizes.query + 3 * sizes.key),
        "input of linear_proj": sizes.tokens * sizes.query * product_bytes,
    }
    context = grid.parallel.context_parallel_size
    if context > 1 and _takes_flex(architecture, grid, shape):
        # Keys and values of all ranks, gathered and put in order, in place of the views.
        items["queries, keys and values"] = wide * (sizes.query + 2 * sizes.key * context)
    if not recompute:
        # In bfloat16 the output is the very input of linear_proj.
        output = wide * sizes.query if product_bytes == FP8 else 0
        items["attention"] = output + sizes.tokens * sizes.heads * FLOAT32
    if architecture.qk_layernorm:
        items["norms of queries and keys"] = wide * (sizes.query + sizes.key)
    if architecture.attention_output_gate:
        items["gate"] = sizes.tokens * sizes.query * (FLOAT32 + sizes.type_bytes)
    return items


def _engine_feed_forward(architecture: Architecture, grid: Grid, sizes: Sizes, *, product_bytes: int) -> dict[str, int]:
    """List what a feed-forward unit of Transformer Engine's spec keeps -> {what: bytes}."""
    wide, normed = sizes.tokens * sizes.type_bytes, sizes.between * sizes.hidden * product_bytes
    if not sizes.has_experts:
        return {"feed-forward": normed + wide * 2 * sizes.width + sizes.tokens * sizes.width * product_bytes}
    # Tokens are exchanged with those who hold their experts; as many come as go where the router is balanced.
    routed = sizes.between * (architecture.moe_router_topk or 0)
    items = {"router": sizes.residual + sizes.between * 3 * (architecture.num_moe_experts or 0) * FLOAT32}
    items["shared experts"] = wide * 2 * sizes.shared + sizes.tokens * sizes.shared * product_bytes
    if architecture.moe_shared_expert_gate:
        items["shared experts"] += sizes.residual + sizes.between * sizes.type_bytes
    items["experts"] = routed * (
        sizes.hidden * product_bytes + sizes.width * (2 * sizes.type_bytes + product_bytes) + 2 * FLOAT32
    )
    return items
