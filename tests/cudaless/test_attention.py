"""On CUDA our attention goes by FlexAttention where more than causality is asked for, and never waits for the device.

FlexAttention's stand-in asks the predicate of every pair and has a backward pass, which torch's own has not on the CPU.
Truth is attention written out, one sequence at a time. Context parallelism: `make test-gpu-emulated`'s layouts.
"""

import pytest
import torch

from megatron_sppo.model.attention import DocumentAttention
from megatron_sppo.model.visibility import PackedRow, Row
from tests.cudaless.device import LOG
from tests.cudaless.engine.kernel import CALLS
from tests.unit.model.test_attention import CONFIG
from tests.unit.model.trees import SEQUENCES, SMALL, Tree, random_heads, random_tree


def on_the_gpu(tree: Tree) -> PackedRow:
    row = tree.row()
    parents = None if row.parents is None else row.parents.to("cuda")
    row = Row(row.documents.to("cuda"), parents, num_tokens=tree.num_tokens)
    return PackedRow(qkv_format="thd", cu_seqlens_q=row.shares, cu_seqlens_kv=row.shares, row=row)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tree", [SMALL, SEQUENCES, random_tree(0, num_tokens=600)])
def test_each_path_attends_by_itself_and_the_host_does_not_wait(
    tree: Tree, window: int | None, softcap: float | None
) -> None:
    heads = random_heads(tree.num_tokens, heads=4, groups=2, dtype=torch.float32)
    weight = torch.randn(tree.num_tokens, 64)
    expected = tree.attention(*heads, scale=0.7, window=window, softcap=softcap)
    wanted = torch.autograd.grad((expected * weight).sum(), heads)
    attention = DocumentAttention(CONFIG, 1, None, "self", softmax_scale=0.7, windows=[window], softcap=softcap)
    moved = [tensor.detach().to("cuda").requires_grad_() for tensor in heads]
    packed, weight = on_the_gpu(tree), weight.to("cuda")
    CALLS.clear()
    LOG.clear()
    context = attention(*moved, packed_seq_params=packed)
    found = torch.autograd.grad((context * weight).sum(), moved)
    if tree is not SEQUENCES or window is not None or softcap is not None:
        assert CALLS["flex_attention"] == 1
        assert not LOG
    else:
        assert CALLS["flex_attention"] == 0  # documents are all: scaled_dot_product_attention has kernels for these
    torch.testing.assert_close(context.cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)
