"""Core attention against softmax attention written out, one sequence at a time. CPU only."""

from types import SimpleNamespace

import pytest
import torch

from megatron_sppo.model.attention import DocumentAttention, with_shared_prompts
from tests.unit.model.trees import SEQUENCES, SMALL, Tree, random_heads, random_tree

PLAIN = {"attention_dropout": 0.0, "context_parallel_size": 1, "tensor_model_parallel_size": 1}
CONFIG = SimpleNamespace(**PLAIN, softmax_type="vanilla")
WITH_SINKS = SimpleNamespace(**PLAIN, softmax_type="learnable", num_attention_heads=4, params_dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tree", [SMALL, SEQUENCES, random_tree(0, num_tokens=600)])
def test_each_path_attends_by_itself(tree: Tree, groups: int, window: int | None, softcap: float | None) -> None:
    heads = random_heads(tree.num_tokens, heads=4, groups=groups)
    # The second of two layers: the first one's window must not matter.
    attention = DocumentAttention(CONFIG, 2, None, "self", softmax_scale=0.7, windows=(3, window), softcap=softcap)
    context = attention(*heads, packed_seq_params=tree.packed())
    expected = tree.attention(*heads, scale=0.7, window=window, softcap=softcap)
    # float32 softmax between float64 products where scores are capped, as Hugging Face's eager attention has it.
    tolerance = 1e-10 if softcap is None else 1e-6
    torch.testing.assert_close(context, expected, rtol=0, atol=tolerance)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((answer * weight).sum(), heads) for answer in (context, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("tree", [SMALL, SEQUENCES])
def test_a_sink_takes_its_part_of_each_heads_softmax(tree: Tree, window: int | None, softcap: float | None) -> None:
    """And has a gradient; one far below all scores takes nothing."""
    heads = random_heads(tree.num_tokens, heads=4, groups=2)
    attention = DocumentAttention(WITH_SINKS, 1, None, "self", softmax_scale=0.7, windows=(window,), softcap=softcap)
    assert attention.softmax_offset is not None
    with torch.no_grad():
        attention.softmax_offset.copy_(torch.tensor([0.3, -1.0, 2.0, -100.0]))
    sinks = attention.softmax_offset.detach().clone().requires_grad_()
    context = attention(*heads, packed_seq_params=tree.packed())
    expected = tree.attention(*heads, scale=0.7, window=window, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-6)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((context * weight).sum(), [*heads, attention.softmax_offset])
    theirs = torch.autograd.grad((expected * weight).sum(), [*heads, sinks])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    without = tree.attention(*heads, scale=0.7, window=window, softcap=softcap).unflatten(1, (4, -1))
    torch.testing.assert_close(context.unflatten(1, (4, -1))[:, 3], without[:, 3], rtol=0, atol=1e-6)


def test_padded_sequences_attend_causally_each_on_its_own() -> None:
    sequence = Tree([6], [-1])
    batch = [random_heads(6, heads=4, groups=4), [tensor.flip(0) for tensor in random_heads(6, heads=4, groups=4)]]
    stacked = [torch.stack(pair, dim=1) for pair in zip(*batch, strict=True)]
    context = DocumentAttention(CONFIG, 1, None, "self")(*stacked)
    columns = [sequence.attention(*heads, scale=16**-0.5, window=None, softcap=None) for heads in batch]
    torch.testing.assert_close(context, torch.stack(columns, dim=1))


class HostAttention(torch.nn.Module):
    """Stands where Transformer Engine's attention would: says that it was asked."""

    def __init__(self, config, layer_number, attn_mask_type, *, softmax_scale=None):
        super().__init__()

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None):
        return "host"


def test_the_hosts_attention_is_asked_for_all_but_shared_prompts() -> None:
    query, key, value = (
        tensor.detach() for tensor in random_heads(SMALL.num_tokens, heads=4, groups=2, dtype=torch.float32)
    )
    cls = with_shared_prompts(HostAttention, windows=[None, 3])
    for layer_number, window in (1, None), (2, 3):
        attention = cls(CONFIG, layer_number, None, softmax_scale=0.5)
        assert attention(query, key, value, None, attn_mask_type=None, packed_seq_params=None) == "host"
        context = attention(query, key, value, None, attn_mask_type=None, packed_seq_params=SMALL.packed())
        expected = SMALL.attention(query, key, value, scale=0.5, window=window, softcap=None)
        torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
