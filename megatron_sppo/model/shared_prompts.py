"""Responses behind one copy of their prompt: what such a packed row tells the layers, and its attention on CUDA.

A packed row is cut into documents. A document sees itself, causally, and all of its parent: a response its prompt.
T = tokens of the row, D = head size. On the CPU `attention.DocumentAttention` computes this document by document.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.utils import is_layer_window_attention
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
    positions: Tensor | None = None
    """[T] int64, place of each token in its sequence."""
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """What `block_mask` has made, by window."""

    def block_mask(self, window: int | None) -> BlockMask:
        """Make the row's mask for FlexAttention, once for all layers of a window; a few [T, T] bool on the way."""
        assert self.documents is not None and self.parents is not None and self.positions is not None
        if window not in self.block_masks:
            number = torch.arange(len(self.parents), dtype=torch.int32, device=self.parents.device)
            document_T, parent_T = (x.repeat_interleave(self.documents.diff()) for x in (number, self.parents))
            num_tokens, device = len(document_T), str(document_T.device)
            sees = tree_mask(document_T, parent_T, self.positions, window=window)
            self.block_masks[window] = create_block_mask(sees, None, None, num_tokens, num_tokens, device=device)
        return self.block_masks[window]


def shared_prompt_params(
    cu_seqlens: Tensor, parents: Tensor, positions: Tensor, *, max_seqlen: int
) -> SharedPromptParams:
    """Describe a packed row of shared prompts to the layers.

    Args:
        positions: [T], place of each token in its sequence.
        max_seqlen: tokens of the longest prompt with its response.
    """
    whole = torch.tensor([0, len(positions)], dtype=torch.int32, device=cu_seqlens.device)
    return SharedPromptParams(
        qkv_format="thd",
        cu_seqlens_q=whole,
        cu_seqlens_kv=whole,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        documents=cu_seqlens,
        parents=parents,
        positions=positions,
    )


def tree_mask(
    document_T: Tensor, parent_T: Tensor, position_T: Tensor, *, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Make FlexAttention's predicate "token q sees token k": k is not later, and in q's document or in its parent.

    Args:
        document_T: [T], number of each token's document.
        parent_T: [T], number of the document that it continues.
        window: see no further back than this many places in the sequence; None: to its beginning.
    """

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        on_path = (k <= q) & ((document_T[k] == document_T[q]) | (document_T[k] == parent_T[q]))
        return on_path if window is None else on_path & (position_T[q] - position_T[k] <= window)

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
    context = attend(
        query,
        key,
        value,
        block_mask=packed.block_mask(window),
        scale=softmax_scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context.squeeze(0).transpose(0, 1).flatten(1)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def with_shared_prompts(core_attention: type) -> type:
    """Teach the host's Transformer Engine attention, which knows no trees, rows of shared prompts -> a subclass."""

    class SharedPromptAttention(core_attention):  # type: ignore[misc]
        def __init__(
            self, config: Any, layer_number: int, *args: Any, softmax_scale: float | None = None, **kwargs: Any
        ) -> None:
            super().__init__(config, layer_number, *args, softmax_scale=softmax_scale, **kwargs)
            self._softmax_scale = softmax_scale
            windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
            self._window = config.window_size[0] if windowed else None

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
        ) -> Tensor:
            if not isinstance(packed_seq_params, SharedPromptParams):
                return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
            return flex_tree_attention(
                query, key, value, packed_seq_params, softmax_scale=self._softmax_scale, window=self._window
            )

    return SharedPromptAttention
