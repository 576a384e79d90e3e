"""Responses behind one copy of their prompt: what such a packed row tells the layers, and its attention on CUDA.

A packed row is cut into documents. A document sees itself, causally, and all of its parent: a response its prompt.
T = tokens of the row, D = head size. On the CPU `attention.DocumentAttention` computes this document by document.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass
class SharedPromptParams(PackedSeqParams):
    """The host's description of a packed row, for a row of shared prompts.

    To the host the row is ONE sequence (`cu_seqlens_q` = [0, T]) whose rotary table has a line for each token, as
    `gpt.PolicyModel` makes it: all that megatron-core does with the boundaries, apart from handing them on to core
    attention, is to apply that table.
    """

    documents: Tensor | None = None
    """[documents + 1] int32, where each document begins and, last, T."""
    parents: Tensor | None = None
    """[documents] int32, number of the document that each one continues; -1: none."""

    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """What `block_mask` has made, by window."""

    def block_mask(self, window: int | None) -> BlockMask:
        """The row's mask for FlexAttention, made once for all layers of a window; a few [T, T] bool on the way."""
        if window not in self.block_masks:
            assert self.documents is not None and self.parents is not None
            predicate = tree_mask(self.documents, self.parents, window=window)
            num_tokens, device = int(self.documents[-1]), str(self.documents.device)
            self.block_masks[window] = create_block_mask(predicate, None, None, num_tokens, num_tokens, device=device)
        return self.block_masks[window]


def shared_prompt_params(
    cu_seqlens: Tensor, parents: Tensor, *, num_tokens: int, max_seqlen: int
) -> SharedPromptParams:
    """Describe a packed row of shared prompts to the layers.

    Args:
        max_seqlen: tokens of the longest prompt with its response.
    """
    whole = torch.tensor([0, num_tokens], dtype=torch.int32, device=cu_seqlens.device)
    return SharedPromptParams(
        qkv_format="thd",
        cu_seqlens_q=whole,
        cu_seqlens_kv=whole,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        documents=cu_seqlens,
        parents=parents,
    )


def tree_mask(
    documents: Tensor, parents: Tensor, *, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Make FlexAttention's predicate "token q sees token k".

    k is in q's document or in its parent, not later, and, by the sequence's own count, less than `window` before it.
    """
    lengths = documents.diff()
    document_T = torch.repeat_interleave(torch.arange(len(parents), device=parents.device), lengths)
    parent_T = parents[document_T]
    before = torch.where(parents >= 0, lengths[parents], 0)  # of a document, in its sequence
    position_T = torch.arange(len(document_T), device=parents.device) - documents[document_T] + before[document_T]

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        within = (k <= q) & ((document_T[k] == document_T[q]) | (document_T[k] == parent_T[q]))
        return within if window is None else within & (position_T[q] - position_T[k] < window)

    return sees


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: SharedPromptParams,
    *,
    softmax_scale: float | None,
    window: int | None = None,
) -> Tensor:
    """Attend by FlexAttention, from [T, heads, D] each -> [T, heads * D]. Compiled on CUDA."""
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    context = attend(query, key, value, block_mask=packed.block_mask(window), scale=softmax_scale, enable_gqa=grouped)
    return context.squeeze(0).transpose(0, 1).flatten(1)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def with_shared_prompts(core_attention: type, *, windows: Sequence[int | None]) -> type:
    """Teach the host's Transformer Engine attention, which knows no trees, rows of shared prompts -> a subclass.

    Args:
        windows: for each layer of the model, how many tokens a query sees, its own included; None is all.
    """

    class SharedPromptAttention(core_attention):  # type: ignore[misc]
        def __init__(self, *args: Any, layer_number: int, softmax_scale: float | None = None, **kwargs: Any) -> None:
            super().__init__(*args, layer_number=layer_number, softmax_scale=softmax_scale, **kwargs)
            self._trees = {"softmax_scale": softmax_scale, "window": windows[layer_number - 1]}

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
        ) -> Tensor:
            if not isinstance(packed_seq_params, SharedPromptParams):
                return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
            return flex_tree_attention(query, key, value, packed_seq_params, **self._trees)

    return SharedPromptAttention
