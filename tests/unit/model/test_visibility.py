"""The predicate and FlexAttention's mask of it against token-by-token construction, on random trees. CPU only."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from megatron_sppo.model.visibility import sees, undivided_row
from tests.memory import LiveBytes
from tests.unit.model.trees import SEQUENCES, SMALL, Tree, random_tree

TREES = [SMALL, SEQUENCES, *(random_tree(seed, num_tokens=1104) for seed in range(2))]


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("tree", TREES)
def test_a_token_sees_its_path_back_to_the_window(tree: Tree, window: int | None) -> None:
    row = tree.row()
    assert torch.equal(sees(row.queries.column(), row.keys, window), tree.visible(window))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tree", TREES)
def test_ranks_see_of_the_row_what_their_tokens_see(tree: Tree, size: int) -> None:
    """Chunks r and 2C - 1 - r of each document, or of the whole row where documents continue others."""
    num_tokens, shared = tree.num_tokens, any(parent >= 0 for parent in tree.parents)
    whole = [range(num_tokens)] if shared else [tree.tokens_of(number) for number in range(len(tree.lengths))]
    assert not any(len(tokens) % (2 * size) for tokens in whole)
    gathered = []
    for rank in range(size):
        held = []
        for tokens in whole:
            chunk = len(tokens) // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                held += tokens[number * chunk : (number + 1) * chunk]
        row = tree.row(rank=rank, size=size)
        assert torch.equal(sees(row.queries.column(), row.keys, 50), tree.visible(50)[held])
        gathered += held
    assert torch.equal(torch.tensor(gathered)[tree.row(size=size).order], torch.arange(num_tokens))


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tree", TREES)
def test_blocks_are_listed_as_torch_lists_them(tree: Tree, size: int, window: int | None) -> None:
    """By queries and by keys, blocks to take whole and those to take by the predicate; all others are skipped."""
    row = tree.row(rank=size - 1, size=size)
    mask = row.block_mask(window)
    visible = sees(row.queries.column(), row.keys, window)
    truth = create_block_mask(lambda _b, _h, q, k: visible[q, k], None, None, *visible.shape, device="cpu")
    assert (mask.seq_lengths, mask.BLOCK_SIZE) == (truth.seq_lengths, truth.BLOCK_SIZE)
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers, wanted = (getattr(each, f"{kind}_num_blocks") for each in (mask, truth))
        assert torch.equal(numbers, wanted)
        ours, theirs = (getattr(each, f"{kind}_indices") for each in (mask, truth))
        assert numbers.is_contiguous() and ours.is_contiguous()  # the kernels do not ask
        for number, one, other in zip(numbers[0, 0], ours[0, 0], theirs[0, 0], strict=True):
            assert torch.equal(one[:number], other[:number])
    index = torch.arange(visible.shape[0])[:, None], torch.arange(visible.shape[1])
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), *index), visible)


def test_a_mask_is_made_once_for_each_window_and_without_all_pairs() -> None:
    """8192 x 8192 pairs are 64 MiB of bool and 256 MiB of int32; 16 Mi of them at a time are a quarter of that."""
    row = undivided_row(8192, rank=0, size=1, device=torch.device("cpu"))
    row.block_mask(None)
    with LiveBytes() as live:
        live.peak = live.current
        before = live.current
        mask = row.block_mask(4096)
    assert live.peak - before < 3 * 64 * 2**20
    assert row.block_mask(4096) is mask
    assert undivided_row(8192, rank=0, size=1, device=torch.device("cpu")) is row
