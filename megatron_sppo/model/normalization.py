"""RMSNorm for the torch layer spec: Hugging Face's rounding, and sequence parallelism, which Megatron-Core's refuses.

Also the norms that neither layer spec of Megatron-Core has: behind a linear layer, and over all heads at once.
"""

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

# S = tokens, B = sequences, N = this rank's heads, D = head size


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation: float32 inside, rounded to the input's type before the weight (LlamaRMSNorm).

    With `layernorm_zero_centered_gamma` the factor is 1 + weight, and rounding comes last (Gemma2RMSNorm).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(initial(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradient of marked parameters over tensor-parallel ranks, each of which saw
        # other tokens (megatron-core 0.16.1 distributed/finalize_model_grads.py).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension -> same shape and type."""
        float_hidden = hidden.float()
        scale = torch.rsqrt(float_hidden.square().mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (float_hidden * scale * (1.0 + self.weight.float())).to(hidden.dtype)
        return self.weight * (float_hidden * scale).to(hidden.dtype)


@functools.cache
def with_post_norm(linear: type, norm: type) -> type:
    """Make a row-parallel linear layer whose output is normalised -> class; its norm is named `post_layernorm`.

    There the output is whole, or under sequence parallelism this rank's tokens of it: what any norm of a layer sees.
    A hook normalises: what else is to be added to the layer's own output hangs in front of it (`adapters`).
    """

    def normalise(layer: Any, _inputs: Any, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
        output, bias = outputs
        return layer.post_layernorm(output if bias is None else output + bias), None

    class PostNormLinear(linear):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: object) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)
            self.register_forward_hook(normalise)

    return PostNormLinear


@functools.cache
def with_bias(linear: type) -> type:
    """Make a linear layer with a bias whatever Megatron-Core says, which has one switch for all linear layers."""

    class BiasedLinear(linear):
        def __init__(self, *args: object, bias: bool, **kwargs: object) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return BiasedLinear


@functools.cache
def with_own_output(linear: type) -> type:
    """Make a row-parallel linear layer whose output may be added to in place.

    Megatron-Core adds an expert's bias so (0.16.1 and 0.19.2, mlp.py), and its own layer's output is a view that
    autograd forbids it for.
    """

    class OwnOutputLinear(linear):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(hidden)
            return output.clone(), bias

    return OwnOutputLinear


class _AcrossHeadsNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks -> [S, B, N, D], rounded after the weight (Olmo2RMSNorm).

    Each rank holds the whole weight and uses its heads' part. finalize_model_grads adds up the gradients of weights
    that are named after q_layernorm and k_layernorm, sequence parallelism or not, which puts the parts together.

    Collectives on the tensor-parallel group: one sum all-reduce of [S, B] forward, one backward.
    """

    heads: str

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.width = getattr(config, self.heads) * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(self.width, dtype=config.params_dtype))
        self.group = parallel_state.get_tensor_model_parallel_group()

    def forward(self, heads_SBND: Tensor) -> Tensor:
        rows = heads_SBND.flatten(-2).float()
        squares = reduce_from_tensor_model_parallel_region(rows.square().sum(-1, keepdim=True), group=self.group)
        # Every rank's heads depend on the sum: their gradients with respect to it add up.
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        weight = self.weight.chunk(self.group.size())[self.group.rank()]
        normalised = rows * torch.rsqrt(squares / self.width + self.eps)
        return (weight * normalised).to(heads_SBND.dtype).view_as(heads_SBND)


class QueryNorm(_AcrossHeadsNorm):
    """One norm over all heads of the queries."""

    heads = "num_attention_heads"


class KeyNorm(_AcrossHeadsNorm):
    """One norm over all heads of the keys."""

    heads = "num_query_groups"
