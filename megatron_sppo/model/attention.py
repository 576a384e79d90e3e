"""Core attention for the torch layer spec: causal within each document, by torch's scaled_dot_product_attention.

Megatron-Core's own local attention refuses packed sequences. Shapes follow the host's SelfAttention:
T = tokens of a packed micro-batch, S = tokens, B = sequences, Q = query heads, G = key/value heads, D = head size.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class DocumentAttention(torch.nn.Module):
    """Causal attention over [S, B, heads, D], or over [T, heads, D] with document boundaries in `cu_seqlens_q`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert attention_type == "self"
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
        """Attend -> [S, B, Q * D], or [T, Q * D] when packed. A given mask is ignored: padding lies at the end."""
        assert attention_bias is None
        if packed_seq_params is None:
            context = self._attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
            return context.permute(2, 0, 1, 3).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        documents = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        contexts = [self._attend(*(tensor[None] for tensor in document))[0] for document in documents]
        return torch.cat(contexts, dim=1).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )
