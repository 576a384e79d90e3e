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
CONFIG = SimpleNamespace(attention_dropout=0.0, context_parallel_size=1)


def row_of_trees():
    bounds = torch.tensor([*STARTS, TOTAL], dtype=torch.int32)
    return shared_prompt_params(bounds, torch.tensor(PARENTS, dtype=torch.int32), num_tokens=TOTAL, max_seqlen=9)


def tokens_of(document: int) -> list[int]:
    return list(range(STARTS[document], STARTS[document] + LENGTHS[document]))


WINDOWS = [None, 3]


def softmax_attention_by_sequence(query, key, value, window=None):
    """[T, heads, D] each, every query head with its own key head -> [T, heads, D]: each path of a tree by itself."""
    context = torch.full_like(query, torch.nan)
    for document, parent in enumerate(PARENTS):
        path = (tokens_of(parent) if parent >= 0 else []) + tokens_of(document)
        scores = torch.einsum("shd,thd->hst", query[path], key[path]) / query.shape[-1] ** 0.5
        hidden = torch.ones(len(path), len(path), dtype=torch.bool).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        out = torch.einsum("hst,thd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[path])
        context[tokens_of(document)] = out[-LENGTHS[document] :]
    return context


def random_heads(groups: int, heads: int = 4):
    torch.manual_seed(0)
    return [torch.randn(TOTAL, count, 16, dtype=torch.float64, requires_grad=True) for count in (heads, groups, groups)]


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_of_flex_attention_is_a_tree(window: int | None) -> None:
    """Token q sees token k where k is on q's path, not later and within the window; written out token by token."""
    sees = tree_mask(row_of_trees().documents, row_of_trees().parents, window=window)
    tokens = torch.arange(TOTAL)
    found = sees(torch.tensor(0), torch.tensor(0), tokens[:, None], tokens[None, :])
    naive = torch.zeros(TOTAL, TOTAL, dtype=torch.bool)
    for document, parent in enumerate(PARENTS):
        path = (tokens_of(parent) if parent >= 0 else []) + tokens_of(document)
        for place, q in enumerate(path):
            if q in tokens_of(document):
                for k in path[0 if window is None else max(0, place - window + 1) : place + 1]:
                    naive[q, k] = True
    assert torch.equal(found, naive)
    # The blocks that FlexAttention skips are those without a pair that sees: here there is one block.
    assert row_of_trees().block_mask(window).shape == (1, 1, TOTAL, TOTAL)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_document_attention_computes_each_path_of_a_tree(groups: int, window: int | None) -> None:
    query, key, value = random_heads(groups)
    repeated = [tensor.repeat_interleave(4 // groups, dim=1) for tensor in (key, value)]
    expected = softmax_attention_by_sequence(query, *repeated, window)
    attention = DocumentAttention(CONFIG, 2, None, "self", windows=[None, window])
    context = attention(query, key, value, packed_seq_params=row_of_trees())
    torch.testing.assert_close(context, expected.flatten(1))
    weight = torch.randn_like(context)
    ours = torch.autograd.grad((context * weight).sum(), (query, key, value), retain_graph=True)
    theirs = torch.autograd.grad((expected.flatten(1) * weight).sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 4])
def test_flex_attention_computes_each_path_of_a_tree(groups: int, window: int | None) -> None:
    query, key, value = (tensor.detach().float() for tensor in random_heads(groups))
    repeated = [tensor.repeat_interleave(4 // groups, dim=1) for tensor in (key, value)]
    expected = softmax_attention_by_sequence(query, *repeated, window)
    context = flex_tree_attention(query, key, value, row_of_trees(), softmax_scale=None, window=window)
    torch.testing.assert_close(context, expected.flatten(1), rtol=1e-5, atol=1e-5)


class HostAttention(torch.nn.Module):
    """Stands where Transformer Engine's attention would: says that it was asked."""

    def __init__(self, config, *, layer_number, softmax_scale=None):
        super().__init__()

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None):
        return "host"


def test_the_hosts_attention_is_asked_for_all_but_trees() -> None:
    query, key, value = (tensor.detach().float() for tensor in random_heads(2))
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    cls = with_shared_prompts(HostAttention, windows=[None, 3])
    for layer_number, window in (1, None), (2, 3):
        attention = cls(CONFIG, layer_number=layer_number, softmax_scale=0.5)
        assert attention(query, key, value, None, attn_mask_type=None, packed_seq_params=None) == "host"
        context = attention(query, key, value, None, attn_mask_type=None, packed_seq_params=row_of_trees())
        scaled = query * 0.5 * 16**0.5  # the given scale, not 1 / sqrt(D)
        expected = softmax_attention_by_sequence(scaled, *repeated, window)
        torch.testing.assert_close(context, expected.flatten(1), rtol=1e-5, atol=1e-5)
