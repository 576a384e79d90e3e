"""DocumentAttention against softmax attention written out with an explicit mask. CPU only."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_sppo.model.attention import DocumentAttention

CONFIG = SimpleNamespace(attention_dropout=0.0, context_parallel_size=1)


def masked_softmax_attention(query, key, value, visible):
    """[S, heads, D] each, one sequence, every query head with its own key head -> [S, heads, D]."""
    scores = torch.einsum("shd,thd->hst", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("hst,thd->shd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_packed_row_attends_within_documents_only(groups: int) -> None:
    torch.manual_seed(0)
    lengths = [5, 1, 7]
    total, heads, size = sum(lengths), 4, 8
    query, key, value = (torch.randn(total, count, size, dtype=torch.float64) for count in (heads, groups, groups))
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    position = torch.arange(total)
    visible = (document[:, None] == document) & (position[:, None] >= position)
    repeated = [tensor.repeat_interleave(heads // groups, dim=1) for tensor in (key, value)]
    expected = masked_softmax_attention(query, *repeated, visible)
    boundaries = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    attention = DocumentAttention(CONFIG, 1, None, "self")
    torch.testing.assert_close(attention(query, key, value, packed_seq_params=packed), expected.flatten(1))


def test_padded_sequences_attend_causally_each_on_its_own() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(6, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    columns = [masked_softmax_attention(query[:, b], key[:, b], value[:, b], visible) for b in range(2)]
    context = DocumentAttention(CONFIG, 1, None, "self")(query, key, value)
    torch.testing.assert_close(context, torch.stack(columns, dim=1).flatten(2))
