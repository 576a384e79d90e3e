"""Attention over shared prompts, in both implementations, against softmax attention over each sequence on its own.

FlexAttention runs uncompiled on the CPU here; its CUDA kernel is not shown.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_sppo.model.attention import DocumentAttention
from megatron_sppo.model.shared_prompts import (
    flex_tree_attention,
    shared_prompt_params,
    tree_mask,
    with_shared_prompts,
)

# A prompt of 4 with responses of 3, 1 and 5; a prompt of 2 with one of 4; padding of 6.
LENGTHS = [4, 3, 1, 5, 2, 4, 6]
PARENTS = [-1, 0, 0, 0, -1, 4, -1]
TOTAL = sum(LENGTHS)
STARTS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
CONFIG = SimpleNamespace(
    attention_dropout=0.0, context_parallel_size=1, window_size=(3, 0), window_attn_skip_freq=[1, 0]
)


def row_of_trees():
    bounds = torch.tensor([*STARTS, TOTAL], dtype=torch.int32)
    positions = [
        place + (LENGTHS[parent] if parent >= 0 else 0)
        for length, parent in zip(LENGTHS, PARENTS, strict=True)
        for place in range(length)
    ]
    return shared_prompt_params(bounds, torch.tensor(PARENTS, dtype=torch.int32), torch.tensor(positions), max_seqlen=9)


def tokens_of(document: int) -> list[int]:
    return list(range(STARTS[document], STARTS[document] + LENGTHS[document]))


def softmax_attention_by_sequence(query, key, value, *, window=TOTAL):
    """[T, heads, D] each, every query head with its own key head -> [T, heads, D]: each path of a tree by itself."""
    context = torch.full_like(query, torch.nan)
    for document, parent in enumerate(PARENTS):
        path = (tokens_of(parent) if parent >= 0 else []) + tokens_of(document)
        scores = torch.einsum("shd,thd->hst", query[path], key[path]) / query.shape[-1] ** 0.5
        distance = torch.arange(len(path))[:, None] - torch.arange(len(path))
        hidden = (distance < 0) | (distance > window)
        out = torch.einsum("hst,thd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[path])
        context[tokens_of(document)] = out[-LENGTHS[document] :]
    return context


def random_heads(groups: int, heads: int = 4):
    torch.manual_seed(0)
    return [torch.randn(TOTAL, count, 16, dtype=torch.float64, requires_grad=True) for count in (heads, groups, groups)]


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_of_flex_attention_is_a_tree(window: int | None) -> None:
    """Token q sees token k where k is on q's path, not later and no further back; written out token by token."""
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    packed, tokens = row_of_trees(), torch.arange(TOTAL)
    sees = tree_mask(numbers, torch.tensor(PARENTS)[numbers], packed.positions, window=window)
    naive = torch.zeros(TOTAL, TOTAL, dtype=torch.bool)
    for document, parent in enumerate(PARENTS):
        path = (tokens_of(parent) if parent >= 0 else []) + tokens_of(document)
        for place, q in enumerate(path):
            for k in path[: place + 1] if window is None else path[max(0, place - window) : place + 1]:
                naive[q, k] = q in tokens_of(document) or naive[q, k]
    assert torch.equal(sees(torch.tensor(0), torch.tensor(0), tokens[:, None], tokens[None, :]), naive)
    assert packed.block_mask(window) is packed.block_mask(window)
    assert packed.block_mask(window).shape == (1, 1, TOTAL, TOTAL)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_document_attention_computes_each_path_of_a_tree(groups: int) -> None:
    query, key, value = random_heads(groups)
    repeated = [tensor.repeat_interleave(4 // groups, dim=1) for tensor in (key, value)]
    expected = softmax_attention_by_sequence(query, *repeated)
    context = DocumentAttention(CONFIG, 1, None, "self")(query, key, value, packed_seq_params=row_of_trees())
    torch.testing.assert_close(context, expected.flatten(1))
    weight = torch.randn_like(context)
    ours = torch.autograd.grad((context * weight).sum(), (query, key, value), retain_graph=True)
    theirs = torch.autograd.grad((expected.flatten(1) * weight).sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("groups", "window"), [(1, None), (4, None), (2, 3)])
def test_flex_attention_computes_each_path_of_a_tree(groups: int, window: int | None) -> None:
    query, key, value = (tensor.detach().float() for tensor in random_heads(groups))
    repeated = [tensor.repeat_interleave(4 // groups, dim=1) for tensor in (key, value)]
    expected = softmax_attention_by_sequence(query, *repeated, window=TOTAL if window is None else window)
    context = flex_tree_attention(query, key, value, row_of_trees(), softmax_scale=None, window=window)
    torch.testing.assert_close(context, expected.flatten(1), rtol=1e-5, atol=1e-5)


class HostAttention(torch.nn.Module):
    """Stands where Transformer Engine's attention would: says that it was asked."""

    def __init__(self, config, layer_number, softmax_scale=None):
        super().__init__()

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None):
        return "host"


@pytest.mark.parametrize(("layer_number", "window"), [(1, 3), (2, TOTAL)])
def test_the_hosts_attention_is_asked_for_all_but_trees(layer_number: int, window: int) -> None:
    """With the scale that it was given, and the window that the host's config gives to its layer (here the first)."""
    query, key, value = (tensor.detach().float() for tensor in random_heads(2))
    attention = with_shared_prompts(HostAttention)(CONFIG, layer_number=layer_number, softmax_scale=0.5)
    assert attention(query, key, value, None, attn_mask_type=None, packed_seq_params=None) == "host"
    context = attention(query, key, value, None, attn_mask_type=None, packed_seq_params=row_of_trees())
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    # The reference divides by sqrt(D) = 4, so queries four times as long and halved have the scale 0.5.
    expected = softmax_attention_by_sequence(query * 0.5 * 16**0.5, *repeated, window=window)
    torch.testing.assert_close(context, expected.flatten(1), rtol=1e-5, atol=1e-5)
