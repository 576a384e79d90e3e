"""Core attention of our own: causal within each document and, where prompts are shared, over what it continues.

Megatron-Core's own local attention refuses packed sequences and context parallelism, and Transformer Engine's knows no
shared prompts, no soft-capped scores, no windows across context-parallel ranks, and no sinks of packed sequences.
Shapes follow mcore's SelfAttention: T = tokens of a packed micro-batch, S = tokens, B = sequences, D = head size. Under
context parallelism queries are this rank's share of the tokens; keys and values of all are gathered, and their
gradients reduce-scattered.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
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
        # Each head's sink, under Megatron-Core's name: a score that takes its part of the softmax and has no value.
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            # Megatron-Core does not mark its own: the gradient's norm would count the first rank's heads alone.
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
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
                sinks=self.softmax_offset,
            )
        else:
            context = self._attend_by_documents(query, key, value, row)
        return context.flatten(2) if packed_seq_params is None else context.squeeze(1).flatten(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the sinks, divided by heads, as Megatron-Core's attention does -> {key: ShardedTensor}."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets
        )
        return sharded

    def _row(self, query: Tensor, packed_seq_params: PackedSeqParams | None) -> Row:
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedRow)
            return packed_seq_params.row
        size = self.context_parallel_size
        rank = parallel_state.get_context_parallel_rank() if size > 1 else 0
        return undivided_row(len(query) * size, rank=rank, size=size, device=query.device)

    def _needs_more_than_causality(self, row: Row) -> bool:
        across_ranks = self.context_parallel_size > 1
        by_scores = self.softcap is not None or self.softmax_offset is not None
        return across_ranks or row.parents is not None or self.window is not None or by_scores

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
        if self.softcap is not None or self.softmax_offset is not None:
            context = _written_out(
                query,
                key,
                value,
                visible=visible,
                scale=self.softmax_scale,
                softcap=self.softcap,
                sinks=self.softmax_offset,
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
                "sinks": None,
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


@functools.cache
def with_gate(self_attention: type) -> type:
    """Make Megatron-Core's attention gate what it answers without torch.compile -> a subclass.

    Its own (0.16.1 and 0.19.2, attention.py) is compiled anew for other numbers of tokens: minutes on a CPU.
    """

    class GatedSelfAttention(self_attention):
        def _apply_output_gate(self, context: Tensor, gate: Tensor) -> Tensor:
            return (context * gate.reshape(context.shape).float().sigmoid()).to(context.dtype)

    return GatedSelfAttention


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend by scores c tanh(q k / c), or beside a sink, rounded as Hugging Face's eager Gemma-2 -> [B, Q, S, D].

    All scores of a document are in memory at once, several times over until backward: recompute_granularity selective
    keeps them of one layer only.
    """
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is None:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1, dtype=torch.float32)
    else:
        column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    return weights.to(query.dtype) @ value
