"""RMSNorm for the torch layer spec: Hugging Face's rounding, and sequence parallelism, which the host's refuses."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation: float32 inside, rounded to the input's type before the weight (LlamaRMSNorm)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradient of marked parameters over tensor-parallel ranks, each of which saw
        # other tokens (megatron-core 0.16.1 distributed/finalize_model_grads.py).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension -> same shape and type."""
        float_hidden = hidden.float()
        scale = torch.rsqrt(float_hidden.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (float_hidden * scale).to(hidden.dtype)
