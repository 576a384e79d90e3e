"""Router losses by arithmetic, and which sequence a rank's tokens belong to. Their gradient in every layout, against
Hugging Face's, is in tests/distributed/test_moe_layouts.py.
"""

import math

import pytest
import torch

from megatron_sppo.model.router_losses import router_losses, sequence_of_tokens


class Ranks:
    """A group of ranks, as far as it is asked for its size."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


ALONE = Ranks(0, 1)
CU_SEQLENS = torch.tensor([0, 4, 12, 16], dtype=torch.int32)
"""Sequences of 3 and 7 tokens in documents of 4 and 8, and 4 tokens of padding."""
LENGTHS = torch.tensor([3, 7])
WHOLE = [0, 0, 0, 2, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]


def one_hot(*experts: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(experts), 2).bool()


def test_losses_of_two_sequences_and_a_padding_token() -> None:
    """Logits (0, ln 3): scores 1/4 and 3/4, log-sum-exp ln 4.

    Sequence 0, two tokens to expert 1: 2 / 2^2 * (0 * 1/2 + 2 * 3/2) = 3/2. Sequence 1, one to each:
    2 / 2^2 * (1 * 1/2 + 1 * 3/2) = 1. Both z losses are (ln 4)^2.
    """
    logits = torch.tensor([[0.0, math.log(3)]]).repeat(5, 1)
    chosen = one_hot(1, 1, 0, 1, 0)
    balance, z = router_losses(logits, chosen, torch.tensor([0, 0, 1, 1, 2]), torch.tensor([2, 2]), topk=1, group=None)
    assert balance.item() == pytest.approx(1.5 + 1.0)
    assert z.item() == pytest.approx(2 * math.log(4) ** 2)


def test_an_even_share_has_a_balance_loss_of_one_and_padding_none() -> None:
    logits, nothing = torch.zeros(4, 2), torch.zeros(0, dtype=torch.int64)
    even = router_losses(logits, one_hot(0, 1, 0, 1), torch.zeros(4).long(), torch.tensor([4]), topk=1, group=None)
    assert even[0].item() == pytest.approx(1.0)
    padding = router_losses(logits, one_hot(0, 1, 0, 1), torch.zeros(4).long(), nothing, topk=1, group=None)
    assert [loss.item() for loss in padding] == [0.0, 0.0]


def test_padding_within_and_after_documents_belongs_to_no_sequence() -> None:
    found = sequence_of_tokens(CU_SEQLENS, LENGTHS, num_tokens=16, context_group=ALONE, sequence_group=None)
    assert found.tolist() == WHOLE


def test_sequence_parallel_ranks_hold_consecutive_tokens() -> None:
    parts = [
        sequence_of_tokens(
            CU_SEQLENS, LENGTHS, num_tokens=16, context_group=ALONE, sequence_group=Ranks(rank, 4)
        ).tolist()
        for rank in range(4)
    ]
    assert [sequence for part in parts for sequence in part] == WHOLE


def test_context_parallel_ranks_hold_both_ends_of_each_document() -> None:
    """Two ranks cut each document in four: the first has its pieces 0 and 3, the second 1 and 2."""
    first, second = (
        sequence_of_tokens(
            CU_SEQLENS, LENGTHS, num_tokens=16, context_group=Ranks(rank, 2), sequence_group=None
        ).tolist()
        for rank in range(2)
    )
    assert first == [0, 2, 1, 1, 1, 2, 2, 2]
    assert second == [0, 0, 1, 1, 1, 1, 2, 2]
