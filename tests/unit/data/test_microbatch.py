"""Proves the collated tensors against a token-by-token construction."""

import itertools

import numpy as np
import pytest
import torch

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.microbatch import IGNORED_LABEL, collate, in_order_of_ranks, packed_attention_mask
from megatron_sppo.data.selection import row_targets, training_index
from tests.unit.data.make import groups, write


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return PreferenceDataset(write(tmp_path_factory.mktemp("microbatch") / "d", groups(num_groups=8)))


def expected_sequence(dataset, index, row):
    prompt = dataset.prompt(index.group[row]).tolist()[-int(index.prompt_lengths[row]) :]
    return prompt, dataset.response(index.group[row], index.response[row]).tolist()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("max_prompt_length", [None, 2])
def test_collated_tensors_equal_a_token_by_token_construction(dataset, packed, multiple, max_prompt_length):
    index = training_index(dataset, "all", pairs=False, max_prompt_length=max_prompt_length)
    rows = np.array([17, 3, 30, 4])
    batch = collate(dataset, index, rows, packed=packed, multiple=multiple, pad_token_id=96)
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
            is_predicting = 0 <= follows < len(response)
            assert batch.labels[batch_row, offset + s] == (response[follows] if is_predicting else IGNORED_LABEL)
            if is_predicting:
                response_rows.append((offset + s) * num_rows + batch_row)
                sequence_index.append(b)
                labels_R.append(response[follows])
        start += len(prompt) + len(response)
        if not packed:
            assert (batch.tokens[b, len(prompt) + len(response) :] == 96).all()
            assert (batch.labels[b, len(prompt) + len(response) :] == IGNORED_LABEL).all()
    if packed:
        assert (batch.tokens[0, start:] == 96).all() and (batch.labels[0, start:] == IGNORED_LABEL).all()
    assert batch.response_rows.tolist() == response_rows
    assert batch.sequence_index.tolist() == sequence_index
    assert batch.labels_R.tolist() == labels_R
    assert batch.response_lengths.tolist() == [len(expected_sequence(dataset, index, row)[1]) for row in rows]


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
    for name in ("labels_R", "sequence_index", "rows", "group", "response", "response_lengths"):
        assert torch.equal(getattr(batch, name), getattr(unshared, name)), name
    assert unshared.parents is None and unshared.num_tokens == int(index.lengths[rows].sum())
    # Of each response all labels but the first stand beside the position that predicts them.
    first = [0, *np.cumsum(index.response_lengths[rows])[:-1].tolist()]
    later = [r for r in range(len(batch.labels_R)) if r not in first]
    assert batch.labels[0][batch.response_rows[later]].tolist() == batch.labels_R[later].tolist()
    assert int((batch.labels != IGNORED_LABEL).sum()) == len(later)


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
        assert torch.equal(batch.labels.T.reshape(-1)[batch.response_rows], batch.labels_R)


@pytest.mark.parametrize("packed", [True, False])
def test_response_rows_in_the_order_of_ranks_pick_each_rank_s_own_hidden_states(dataset, packed):
    """Four ranks with a quarter of the positions each: every label once, in its sequence, from its owner's quarter."""
    index = training_index(dataset, "all", pairs=False)
    batch = collate(dataset, index, np.arange(5), packed=packed, multiple=4)
    ordered = in_order_of_ranks(batch, size=4)
    quarters = batch.labels.T.reshape(4, -1)
    assert ordered.rows_of_ranks == tuple((quarters != IGNORED_LABEL).sum(1).tolist())
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


def test_packed_and_padded_hold_the_same(dataset):
    index = training_index(dataset, "all", pairs=False)
    rows = np.array([1, 9, 25])
    targets = row_targets(dataset, index, eta=3.0)
    one, two = (collate(dataset, index, rows, packed=packed, targets=targets) for packed in (True, False))
    for name in (
        "labels_R",
        "sequence_index",
        "rows",
        "group",
        "response",
        "chosen",
        "response_lengths",
        "win_rate",
        "log_z",
    ):
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
    batch = collate(
        dataset,
        index,
        np.empty(0, dtype=np.int64),
        packed=packed,
        multiple=8,
        targets=row_targets(dataset, index, eta=1.0),
    )
    assert batch.tokens.shape == (1, 8) and batch.num_sequences == 0
    assert len(batch.response_rows) == len(batch.labels_R) == len(batch.sequence_index) == len(batch.win_rate) == 0
    assert (batch.labels == IGNORED_LABEL).all()


def test_float_columns_follow_their_rows_and_are_nan_where_unknown(dataset):
    index = training_index(dataset, "all", pairs=True)
    targets, rows = row_targets(dataset, index, eta=3.0), np.array([4, 5, 10, 11])
    reference_GK = -np.arange(32, dtype=np.float32).reshape(8, 4)
    batch = collate(dataset, index, rows, packed=True, targets=targets, reference_GK=reference_GK)
    expected = [-(4 * int(index.group[row]) + int(index.response[row])) for row in rows]
    assert batch.reference_log_prob.tolist() == expected
    assert batch.preference.tolist() == targets.preference[rows].tolist()
    assert batch.win_rate.tolist() == targets.win_rate[rows].tolist()
    assert batch.chosen.tolist() == [True, False, True, False]
    bare = collate(dataset, index, rows, packed=True)
    assert all(getattr(bare, name).isnan().all() for name in ("win_rate", "log_z", "preference", "reference_log_prob"))
    assert batch.to("meta").tokens.device.type == "meta"


def test_packed_mask_is_block_diagonal_and_causal():
    """Documents of 2 and 3 tokens: s sees t only in its own document and not later."""
    mask = packed_attention_mask(torch.tensor([0, 2, 5], dtype=torch.int32), 5)
    document = [0, 0, 1, 1, 1]
    naive = [[not (document[s] == document[t] and t <= s) for t in range(5)] for s in range(5)]
    assert mask.shape == (1, 1, 5, 5) and mask[0, 0].tolist() == naive


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
    assert torch.equal(taller.tokens[:2], plain.tokens) and (taller.labels[2:] == IGNORED_LABEL).all()
    for batch in (plain, taller):
        assert torch.equal(batch.labels.T.reshape(-1)[batch.response_rows], batch.labels_R)
