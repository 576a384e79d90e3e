"""Core attention of our own: causal within each document and, where prompts are shared, over what it continues.

Megatron-Core's own local attention refuses packed sequences and context parallelism, and Transformer Engine's knows no
shared prompts, no soft-capped scores, and no windows across context-parallel ranks. Shapes follow mcore's
SelfAttention: T = tokens of a packed micro-batch, S = tokens, B = sequences, D = head size. Under context parallelism
queries are this rank's share of the tokens; keys and values of all are gathered, and their gradients reduce-scattered.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sppo.model.flex import flex
from megatron_sppo.model.visibility import PackedRow, Row, sees, undivided_row


class DocumentAttention(torch.nn.Module):
    """Attention over [S, B, heads, D], or over the [T, heads, D] of a PackedRow.

    By torch's scaled_dot_product_attention, document by document; on CUDA, where more than causality is asked for, by
    FlexAttention, which neither makes the masks (nor, where scores are capped, the scores) nor waits for the device.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        windows: Sequence[int | None] | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> None:
        """Build it for one layer.

        Args:
            layer_number: of the whole model, from 1.
            windows: for each layer of the model, how many tokens a query sees, its own included; None is all.
            softcap: scores s become c tanh(s / c).
        """
        super().__init__()
        assert attention_type == "self"
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout)
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.window = None if windows is None else windows[layer_number - 1]
        self.context_parallel_size = config.context_parallel_size

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
        row = self._row(query, packed_seq_params)
        if packed_seq_params is not None:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key, value = (gather_row(tensor, row, size=self.context_parallel_size) for tensor in (key, value))
        if query.is_cuda and self._needs_more_than_causality(row):
            context = flex(
                query,
                key,
                value,
                row,
                softmax_scale=self.softmax_scale,
                window=self.window,
                softcap=self.softcap,
            )
        else:
            context = self._attend_by_documents(query, key, value, row)
        return context.flatten(2) if packed_seq_params is None else context.squeeze(1).flatten(1)

    def _row(self, query: Tensor, packed_seq_params: PackedSeqParams | None) -> Row:
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedRow)
            return packed_seq_params.row
        size = self.context_parallel_size
        rank = parallel_state.get_context_parallel_rank() if size > 1 else 0
        return undivided_row(len(query) * size, rank=rank, size=size, device=query.device)

    def _needs_more_than_causality(self, row: Row) -> bool:
        across_ranks = self.context_parallel_size > 1
        return across_ranks or row.parents is not None or self.window is not None or self.softcap is not None

    def _attend_by_documents(self, query: Tensor, key: Tensor, value: Tensor, row: Row) -> Tensor:
        """Attend from this rank's tokens of each document to the keys of its path -> [S / C, B, Q, D]."""
        contexts = []
        for here, path, whole in row.spans:
            visible = None
            if not whole or (self.window is not None and here.stop - here.start > self.window):
                visible = sees(row.queries.at(here).column(), row.keys.at(path), self.window)
            contexts.append(self._attend(query[here], key[path], value[path], visible=visible))
        return torch.cat(contexts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor | None) -> Tensor:
        """Attend causally (`visible` None) or where `visible` [queries, keys] -> [S, B, Q, D]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.softcap is not None:
            context = _capped_attention(
                query, key, value, visible=visible, scale=self.softmax_scale, softcap=self.softcap
            )
            return context.permute(2, 0, 1, 3)
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3)


def gather_row(tensor: Tensor, row: Row, *, size: int) -> Tensor:
    """Gather what each context-parallel rank has of a row -> [S, ...] in the row's order. Collective on that group."""
    if size == 1:
        return tensor
    return gather_from_sequence_parallel_region(tensor, group=parallel_state.get_context_parallel_group())[row.order]


def with_shared_prompts(core_attention: type, *, windows: Sequence[int | None]) -> type:
    """Teach Megatron-Core's Transformer Engine attention, which knows no shared prompts, rows of such -> a subclass.

    Args:
        windows: for each layer of the model, how many tokens a query sees, its own included; None is all.
    """

    class SharedPromptAttention(core_attention):
        def __init__(
            self,
            config: TransformerConfig,
            layer_number: int,
            *args: Any,
            softmax_scale: float | None = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(config, layer_number, *args, softmax_scale=softmax_scale, **kwargs)
            self._flex: dict[str, Any] = {
                "softmax_scale": softmax_scale,
                "window": windows[layer_number - 1],
                "softcap": None,
            }
            self._context_parallel_size = config.context_parallel_size

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
        ) -> Tensor:
            if not isinstance(packed_seq_params, PackedRow) or not packed_seq_params.shares_prompts:
                return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
            row, size = packed_seq_params.row, self._context_parallel_size
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            key, value = (gather_row(tensor, row, size=size) for tensor in (key, value))
            return flex(query, key, value, row, **self._flex).squeeze(1).flatten(1)

    return SharedPromptAttention


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Attend by scores c tanh(q k / c), written out and rounded as Hugging Face's eager Gemma-2 -> [B, Q, S, D].

    All scores of a document are in memory at once, several times over until backward: recompute_granularity selective
    keeps them of one layer only.
    """
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if visible is None:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value
