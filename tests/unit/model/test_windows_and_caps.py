"""DocumentAttention with a window and with soft-capped scores, against softmax attention written out. CPU only."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_sppo.model.attention import DocumentAttention

CONFIG = SimpleNamespace(attention_dropout=0.0, context_parallel_size=1)
LENGTHS = [7, 1, 12]


def written_out(query, key, value, *, window, softcap, scale):
    """[T, heads, D], [T, groups, D] twice, documents one after the other -> [T, heads * D], one query at a time."""
    repeats, rows, start = query.shape[1] // key.shape[1], [], 0
    for length in LENGTHS:
        for i in range(start, start + length):
            first = start if window is None else max(start, i - window + 1)
            heads = []
            for head in range(query.shape[1]):
                seen = slice(first, i + 1)
                scores = key[seen, head // repeats] @ query[i, head] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                heads.append(scores.softmax(0) @ value[seen, head // repeats])
            rows.append(torch.cat(heads))
        start += length
    return torch.stack(rows)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
def test_each_query_sees_its_window_of_capped_scores(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(sum(LENGTHS), count, 6, dtype=torch.float64, requires_grad=True) for count in (4, 2, 2)
    )
    boundaries = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    # The second of two layers: the first one's window must not matter.
    attention = DocumentAttention(CONFIG, 2, None, "self", softmax_scale=0.7, windows=(3, window), softcap=softcap)
    context = attention(query, key, value, packed_seq_params=packed)
    expected = written_out(query, key, value, window=window, softcap=softcap, scale=0.7)
    # float32 softmax between float64 products where scores are capped, as Hugging Face's eager attention has it.
    tolerance = 1e-10 if softcap is None else 1e-6
    torch.testing.assert_close(context, expected, rtol=0, atol=tolerance)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((answer * weight).sum(), (query, key, value)) for answer in (context, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance)
