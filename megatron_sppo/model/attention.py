"""Core attention for the torch layer spec: causal within each document, by torch's scaled_dot_product_attention.

Megatron-Core's own local attention refuses packed sequences and context parallelism. Shapes follow the host's
SelfAttention: T = tokens of a packed micro-batch, S = tokens, B = sequences, D = head size. Under context parallelism
queries are this rank's share of the tokens; keys and values of all are gathered, and their gradients reduce-scattered.
"""

import itertools

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sppo.model.shared_prompts import SharedPromptParams
from megatron_sppo.zigzag import zigzag_positions


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
        if isinstance(packed_seq_params, SharedPromptParams):
            return self._attend_within_trees(query, key, value, packed_seq_params).squeeze(1).flatten(1)
        if packed_seq_params is None:
            boundaries = torch.tensor([0, query.shape[0] * self.context_parallel_size])
        else:
            boundaries = packed_seq_params.cu_seqlens_q
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        if self.context_parallel_size > 1:
            context = self._attend_across_ranks(query, key, value, boundaries)
        else:
            lengths = boundaries.diff().tolist()
            documents = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
            context = torch.cat([self._attend(*document, visible=None) for document in documents])
        return context.flatten(2) if packed_seq_params is None else context.squeeze(1).flatten(1)

    def _attend_across_ranks(self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor) -> Tensor:
        """Attend from this rank's tokens to all tokens of their documents -> [S / C, B, Q, D]."""
        group, size = parallel_state.get_context_parallel_group(), self.context_parallel_size
        held = [zigzag_positions(boundaries, rank=rank, size=size) for rank in range(size)]
        # Gathered rows come rank by rank; this puts them back into the order of the text.
        order = torch.cat(held).argsort().to(query.device)
        key, value = (gather_from_sequence_parallel_region(tensor, group=group)[order] for tensor in (key, value))
        position = held[group.rank()].to(query.device)
        contexts, first = [], 0
        for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
            here = slice(first, first + (end - start) // size)
            visible = self._sees(position[here], torch.arange(start, end, device=query.device))
            contexts.append(self._attend(query[here], key[start:end], value[start:end], visible=visible))
            first = here.stop
        return torch.cat(contexts)

    def _attend_within_trees(self, query: Tensor, key: Tensor, value: Tensor, packed: SharedPromptParams) -> Tensor:
        """Attend from each document to itself and to the one that it continues -> [T, 1, Q, D]."""
        assert packed.documents is not None and packed.parents is not None
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        bounds = packed.documents.tolist()
        spans = [slice(start, end) for start, end in itertools.pairwise(bounds)]
        contexts = []
        for here, parent in zip(spans, packed.parents.tolist(), strict=True):
            keys, values, visible = key[here], value[here], None
            if parent >= 0:
                keys, values = (torch.cat([tensor[spans[parent]], tensor[here]]) for tensor in (key, value))
                places = torch.arange(len(keys), device=query.device)
                visible = self._sees(places[-len(query[here]) :], places)
            contexts.append(self._attend(query[here], keys, values, visible=visible))
        return torch.cat(contexts)

    def _sees(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Compare positions -> [queries, keys] bool: not later."""
        return query_position[:, None] >= key_position

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor | None) -> Tensor:
        """Attend causally (`visible` None) or where `visible` [queries, keys] -> [S, B, Q, D]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
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
