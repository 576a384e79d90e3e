"""FlexAttention over trees, windows and soft caps against softmax attention over each sequence on its own.

It runs uncompiled on the CPU here, forward only (torch has no backward there): what is shown is what we ask of it, and
that dynamo compiles it a few times for any shapes or raises. Its CUDA kernel is not shown.
"""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megatron_sppo.errors import ConfigError
from megatron_sppo.model import flex as module
from megatron_sppo.model.flex import flex
from megatron_sppo.model.zigzag import zigzag_shares
from tests.unit.model.trees import SEQUENCES, SMALL, Tree, random_heads, random_tree


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("tree", [SMALL, SEQUENCES, random_tree(0, num_tokens=600)])
def test_each_path_attends_by_itself(
    tree: Tree, groups: int, size: int, window: int | None, softcap: float | None
) -> None:
    """Whatever rank a query is on: its keys are those of the whole row."""
    heads = random_heads(tree.num_tokens, heads=4, groups=groups, dtype=torch.float32)
    query, key, value = (tensor.detach() for tensor in heads)
    expected = tree.attention(query, key, value, scale=0.3, window=window, softcap=softcap)
    for rank in range(size):
        row = tree.row(rank=rank, size=size)
        held = zigzag_shares(row.shares, num_tokens=tree.num_tokens, size=size)[rank]
        answer = flex(
            *(tensor.unsqueeze(1) for tensor in (query[held], key, value)),
            row,
            softmax_scale=0.3,
            window=window,
            softcap=softcap,
        )
        torch.testing.assert_close(answer.squeeze(1).flatten(1), expected[held], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tree", [SMALL, random_tree(0, num_tokens=600)])
def test_a_sink_takes_its_part_of_each_heads_softmax(tree: Tree, window: int | None) -> None:
    heads = random_heads(tree.num_tokens, heads=4, groups=2, dtype=torch.float32)
    query, key, value = (tensor.detach() for tensor in heads)
    sinks = torch.tensor([0.3, -1.0, 2.0, -100.0])
    expected = tree.attention(query, key, value, scale=0.3, window=window, sinks=sinks)
    tensors = (tensor.unsqueeze(1) for tensor in (query, key, value))
    answer = flex(*tensors, tree.row(), softmax_scale=0.3, window=window, softcap=None, sinks=sinks)
    torch.testing.assert_close(answer.squeeze(1).flatten(1), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch):
    """Let `flex` compile on the CPU as it would on CUDA, up to dynamo's part -> counter of compiled graphs."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = module._compiled(counter)
    monkeypatch.setattr(module, "flex_attention", compiled)
    yield counter
    torch._dynamo.reset()


def attend(num_tokens: int, *, window: int | None, softcap: float | None, heads: int = 4) -> None:
    tree = Tree([num_tokens // 2, num_tokens - num_tokens // 2], [-1, 0])
    tensors = random_heads(num_tokens, heads=heads, groups=2, dtype=torch.float32)
    with torch.no_grad():
        flex(
            *(tensor.detach().unsqueeze(1) for tensor in tensors),
            tree.row(),
            softmax_scale=0.3,
            window=window,
            softcap=softcap,
        )


LENGTHS = [300, 517, 1024, 64, 128, 2, 129, 700, 701, 702, 900, 2048, 333, 444, 555, 666, 777, 888, 999, 1111]


def test_twenty_lengths_of_rows_and_any_window_are_compiled_for_thrice(compilations: CompileCounter) -> None:
    """For the first, for any other, and for those of one block: dynamo takes sizes of 1 for constants."""
    for num_tokens, window in itertools.product(LENGTHS, (None, 7, 128)):
        attend(num_tokens, window=window, softcap=None)
    assert compilations.frame_count == 3


def test_any_soft_cap_is_compiled_for_twice(compilations: CompileCounter) -> None:
    for num_tokens, softcap in itertools.product((300, 517, 1024), (30.0, 50.0)):
        attend(num_tokens, window=None, softcap=softcap)
    assert compilations.frame_count == 2


def test_a_run_that_would_go_on_uncompiled_ends(compilations: CompileCounter, monkeypatch) -> None:
    monkeypatch.setattr(module, "_COMPILATIONS", 2)
    for heads in (2, 4):
        attend(300, window=None, softcap=None, heads=heads)
    with pytest.raises(ConfigError, match=r"compiled 2 times, .* --no-share-prompts"):
        attend(300, window=None, softcap=None, heads=8)
    assert compilations.frame_count == 2
