"""Proves the collated tensors against a token-by-token construction."""

import itertools

import numpy as np
import pytest
import torch

from megatron_sppo.data import microbatch
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.microbatch import MicroBatch, in_order_of_ranks
from megatron_sppo.data.selection import row_targets, training_index
from tests.unit.data.make import groups, write


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return PreferenceDataset(write(tmp_path_factory.mktemp("microbatch") / "d", groups(num_groups=8)))


def collate(dataset, index, rows, **settings) -> MicroBatch:
    """Make a micro-batch with the targets of its rows."""
    targets = row_targets(dataset, index, eta=3.0).of(torch.from_numpy(rows))
    return microbatch.collate(dataset, index, rows, targets=targets, **settings)


def expected_sequence(dataset, index, row):
    prompt = dataset.prompt(index.group[row]).tolist()[-int(index.prompt_lengths[row]) :]
    return prompt, dataset.response(index.group[row], index.response[row]).tolist()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("max_prompt_length", [None, 2])
def test_collated_tensors_equal_a_token_by_token_construction(dataset, packed, multiple, max_prompt_length):
    index = training_index(dataset, "all", pairs=False, max_prompt_length=max_prompt_length)
    rows = np.array([17, 3, 30, 4])
    batch = collate(dataset, index, rows, packed=packed, multiple=multiple)
    num_rows, num_columns = batch.tokens.shape
    assert num_columns % multiple == 0 and num_rows == (1 if packed else 4)
    response_rows, sequence_index, labels_R, start = [], [], [], 0
    for b, row in enumerate(rows):
        prompt, response = expected_sequence(dataset, index, row)
        batch_row, offset = (0, start) if packed else (b, 0)
        for s, token in enumerate(prompt + response):
            assert batch.tokens[batch_row, offset + s] == token
            assert batch.position_ids[batch_row, offset + s] == s
            follows = s + 1 - len(prompt)
            if 0 <= follows < len(response):
                response_rows.append((offset + s) * num_rows + batch_row)
                sequence_index.append(b)
                labels_R.append(response[follows])
        start += len(prompt) + len(response)
        if not packed:
            assert (batch.tokens[b, len(prompt) + len(response) :] == 0).all()
    if packed:
        assert (batch.tokens[0, start:] == 0).all()
    assert batch.response_rows.tolist() == response_rows
    assert batch.sequence_index.tolist() == sequence_index
    assert batch.labels_R.tolist() == labels_R
    assert batch.lengths.tolist() == [sum(map(len, expected_sequence(dataset, index, row))) for row in rows]


def test_shared_prompts_equal_a_token_by_token_construction(dataset):
    """Rows of prompts 4 4 4, 0, 7 7: each prompt once, its responses behind it, their positions going on from it."""
    index = training_index(dataset, "all", pairs=False, max_prompt_length=5)
    rows = np.array([16, 19, 17, 3, 30, 29])
    batch = collate(dataset, index, rows, packed=True, share_prompts=True, multiple=16)
    tokens, positions, bounds, parents, predicting = [], [], [0], [], []
    for members in ([16, 19, 17], [3], [30, 29]):
        prompt, _ = expected_sequence(dataset, index, members[0])
        parent, last = len(parents), len(tokens) + len(prompt) - 1
        tokens += prompt
        positions += range(len(prompt))
        bounds.append(len(tokens))
        parents.append(-1)
        for row in members:
            _, response = expected_sequence(dataset, index, row)
            predicting += [last, *range(len(tokens), len(tokens) + len(response) - 1)]
            tokens += response
            positions += range(len(prompt), len(prompt) + len(response))
            bounds.append(len(tokens))
            parents.append(parent)
    assert batch.num_tokens == len(tokens) < int(index.lengths[rows].sum())
    padding = batch.tokens.shape[1] - len(tokens)
    assert batch.tokens.shape == (1, -(-len(tokens) // 16) * 16) and padding > 0
    assert batch.tokens[0].tolist() == tokens + [0] * padding
    assert batch.position_ids[0].tolist() == positions + list(range(padding))
    assert batch.cu_seqlens.tolist() == [*bounds, batch.tokens.shape[1]] and batch.cu_seqlens.dtype == torch.int32
    assert batch.parents.tolist() == [*parents, -1]
    assert batch.max_seqlen == max(max(positions) + 1, padding)
    assert batch.response_rows.tolist() == predicting
    unshared = collate(dataset, index, rows, packed=True)
    for name in ("labels_R", "sequence_index", "rows", "lengths"):
        assert torch.equal(getattr(batch, name), getattr(unshared, name)), name
    assert unshared.parents is None and unshared.num_tokens == int(index.lengths[rows].sum())


def test_response_rows_pick_the_hidden_states_of_megatrons_layout(dataset):
    """Hidden states that hold their own token id, in [S, b, H]: the row picked is the token before each label."""
    index = training_index(dataset, "all", pairs=False)
    for packed in (True, False):
        batch = collate(dataset, index, np.arange(5), packed=packed)
        hidden = batch.tokens.T.unsqueeze(-1)
        before = []
        for row in range(5):
            prompt, response = expected_sequence(dataset, index, row)
            before += (prompt + response)[len(prompt) - 1 : -1]
        assert hidden.reshape(-1, 1)[batch.response_rows].flatten().tolist() == before


@pytest.mark.parametrize("packed", [True, False])
def test_response_rows_in_the_order_of_ranks_pick_each_rank_s_own_hidden_states(dataset, packed):
    """Four ranks with a quarter of the positions each: every label once, in its sequence, from its owner's quarter."""
    index = training_index(dataset, "all", pairs=False)
    batch = collate(dataset, index, np.arange(5), packed=packed, multiple=4)
    ordered = in_order_of_ranks(batch, size=4)
    quarters = labels_of_positions(batch).reshape(4, -1)
    assert ordered.rows_of_ranks == tuple((quarters >= 0).sum(1).tolist())
    parts = [
        values.split(list(ordered.rows_of_ranks))
        for values in (ordered.response_rows, ordered.labels_R, ordered.sequence_index)
    ]
    for quarter, (labels, rows, own, sequence) in enumerate(zip(quarters, *parts, strict=True)):
        assert torch.equal(labels[rows - quarter * len(labels)], own)
        assert (sequence.diff() >= 0).all()
    for sequence in range(5):
        assert torch.equal(
            ordered.labels_R[ordered.sequence_index == sequence], batch.labels_R[batch.sequence_index == sequence]
        )


def labels_of_positions(batch):
    """Put each label beside the position that predicts it, in Megatron's layout -> [S * b], -1 where none is."""
    return torch.full((batch.tokens.numel(),), -1).index_put((batch.response_rows,), batch.labels_R)


def test_packed_and_padded_hold_the_same(dataset):
    index = training_index(dataset, "all", pairs=False)
    rows = np.array([1, 9, 25])
    one, two = (collate(dataset, index, rows, packed=packed) for packed in (True, False))
    for name in ("labels_R", "sequence_index", "rows", "lengths"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    bounds = one.cu_seqlens.tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        assert torch.equal(one.tokens[0, begin:end], two.tokens[b, : end - begin])


@pytest.mark.parametrize("length", [None, 128])
def test_cu_seqlens_cover_the_row_and_padding_is_its_own_document(dataset, length):
    index = training_index(dataset, "all", pairs=False)
    batch = collate(dataset, index, np.array([0, 1]), packed=True, length=length)
    bounds = batch.cu_seqlens
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == batch.tokens.shape[1]
    sizes = index.lengths[:2].tolist()
    assert bounds.diff().tolist() == sizes + ([128 - sum(sizes)] if length else [])
    assert batch.max_seqlen == max(bounds.diff().tolist())
    restarts = torch.cat([torch.arange(size) for size in bounds.diff().tolist()])
    assert torch.equal(batch.position_ids[0], restarts)


@pytest.mark.parametrize("packed", [True, False])
def test_a_micro_batch_of_padding_alone_has_no_sequence_but_something_to_compute(dataset, packed):
    index = training_index(dataset, "all", pairs=False)
    batch = collate(dataset, index, np.empty(0, dtype=np.int64), packed=packed, multiple=8)
    assert batch.tokens.shape == (1, 8) and batch.num_sequences == 0
    assert (
        len(batch.response_rows) == len(batch.labels_R) == len(batch.sequence_index) == len(batch.targets.win_rate) == 0
    )


def test_targets_move_along(dataset):
    index, rows = training_index(dataset, "all", pairs=True), np.array([4, 5, 10, 11])
    batch = collate(dataset, index, rows, packed=True)
    assert batch.targets.win_rate.tolist() == row_targets(dataset, index, eta=3.0).win_rate[rows].tolist()
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.labels_R.device.type, moved.targets.chosen.device.type} == {"meta"}


def test_a_length_that_is_too_small_is_our_own_mistake(dataset):
    index = training_index(dataset, "all", pairs=False)
    with pytest.raises(AssertionError):
        collate(dataset, index, np.arange(8), packed=True, length=4)


def test_rows_of_padding_fill_a_padded_micro_batch_up_and_change_nothing_else(dataset):
    """Pipeline stages want one shape a step: the same sequences in a taller tensor, picked by the same labels."""
    index = training_index(dataset, "all", pairs=False)
    plain = collate(dataset, index, np.array([5, 6]), packed=False)
    taller = collate(dataset, index, np.array([5, 6]), packed=False, num_batch_rows=4)
    assert taller.tokens.shape == (4, plain.tokens.shape[1]) and taller.num_sequences == 2
    assert torch.equal(taller.tokens[:2], plain.tokens)
    columns = [labels_of_positions(batch).reshape(-1, batch.tokens.shape[0]) for batch in (plain, taller)]
    assert torch.equal(columns[1][:, :2], columns[0]) and (columns[1][:, 2:] == -1).all()
