"""Responses behind one copy of their prompt: what such a packed row tells the layers, and its attention on CUDA.

A packed row is cut into documents. A document sees itself, causally, and all of its parent: a response its prompt.
T = tokens of the row, D = head size. On the CPU `attention.DocumentAttention` computes this document by document.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
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

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """The row's mask for FlexAttention, made once for all layers of a pass; a few [T, T] bool on the way."""
        assert self.documents is not None and self.parents is not None
        document_T, parent_T = documents_of_tokens(self.documents, self.parents)
        num_tokens, device = len(document_T), document_T.device
        return create_block_mask(
            tree_mask(document_T, parent_T), None, None, num_tokens, num_tokens, device=str(device)
        )


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


def documents_of_tokens(documents: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
    """Say for each token which document it is in, and which one that continues -> [T], [T] int32."""
    number = torch.arange(len(parents), dtype=torch.int32, device=parents.device)
    lengths = documents.diff()
    return torch.repeat_interleave(number, lengths), torch.repeat_interleave(parents, lengths)


def tree_mask(document_T: Tensor, parent_T: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Make FlexAttention's predicate "token q sees token k": k is not later, and in q's document or in its parent."""

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((document_T[k] == document_T[q]) | (document_T[k] == parent_T[q]))

    return sees


def flex_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: SharedPromptParams, *, softmax_scale: float | None
) -> Tensor:
    """Attend by FlexAttention, from [T, heads, D] each -> [T, heads * D]. Compiled on CUDA."""
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    context = attend(query, key, value, block_mask=packed.block_mask, scale=softmax_scale, enable_gqa=grouped)
    return context.squeeze(0).transpose(0, 1).flatten(1)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def with_shared_prompts(core_attention: type) -> type:
    """Teach the host's Transformer Engine attention, which knows no trees, rows of shared prompts -> a subclass."""

    class SharedPromptAttention(core_attention):  # type: ignore[misc]
        def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
            super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
            self._softmax_scale = softmax_scale

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
        ) -> Tensor:
            if not isinstance(packed_seq_params, SharedPromptParams):
                return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
            return flex_tree_attention(query, key, value, packed_seq_params, softmax_scale=self._softmax_scale)

    return SharedPromptAttention
