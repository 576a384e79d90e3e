"""Proves the plan's properties on random batches and the collated tensors against a token-by-token construction."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.microbatch import (
    IGNORED_LABEL,
    collate,
    epoch_order,
    packed_attention_mask,
    plan_step,
    rows_of_units,
)
from megatron_sppo.data.selection import row_targets, training_index
from tests.unit.data.make import groups, write


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return PreferenceDataset(write(tmp_path_factory.mktemp("microbatch") / "d", groups(num_groups=8)))


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(100, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        assert sorted(order.tolist()) == list(range(100))
    assert len({tuple(order) for order in orders.values()}) == 4
    assert np.array_equal(epoch_order(100, seed=1, epoch=1), orders[1, 1])
    assert len(epoch_order(0, seed=0, epoch=0)) == 0


def test_epoch_order_is_that_of_the_raw_generator():
    """Order of PCG64's 64-bit words, which numpy promises never to change; sorted here by Python."""
    words = np.random.PCG64(np.random.SeedSequence([7, 3])).random_raw(20).tolist()
    assert epoch_order(20, seed=7, epoch=3).tolist() == sorted(range(20), key=words.__getitem__)


def test_units_expand_to_neighbouring_rows():
    assert rows_of_units(np.array([3, 0]), unit_size=2).tolist() == [6, 7, 0, 1]
    assert rows_of_units(np.array([3, 0]), unit_size=1).tolist() == [3, 0]


@st.composite
def steps(draw):
    unit_size = draw(st.sampled_from([1, 2]))
    num_units = draw(st.integers(1, 60))
    lengths = np.array(draw(st.lists(st.integers(1, 2000), min_size=num_units * 2, max_size=num_units * 2)))
    units = np.array(draw(st.permutations(range(num_units))))
    sizes = {"data_parallel_size": draw(st.integers(1, 8)), "micro_batch_size": unit_size * draw(st.integers(1, 5))}
    sizes["multiple"] = draw(st.integers(1, 3))
    return rows_of_units(units, unit_size=unit_size), lengths, {**sizes, "unit_size": unit_size}


@hypothesis_settings(max_examples=150, deadline=None)
@given(steps())
def test_a_plan_holds_every_row_once_in_bounded_equal_and_whole_micro_batches(step):
    rows, lengths, sizes = step
    plan = plan_step(rows, lengths, **sizes)
    needed = -(-len(rows) // (sizes["data_parallel_size"] * sizes["micro_batch_size"]))
    num_micro_batches = -(-needed // sizes["multiple"]) * sizes["multiple"]
    assert [len(rank) for rank in plan] == [num_micro_batches] * sizes["data_parallel_size"]
    flat = [micro_batch for rank in plan for micro_batch in rank]
    assert sorted(np.concatenate(flat).tolist()) == sorted(rows.tolist())
    assert all(len(micro_batch) <= sizes["micro_batch_size"] for micro_batch in flat)
    if sizes["unit_size"] == 2:
        for micro_batch in flat:
            assert (micro_batch[0::2] % 2 == 0).all() and (micro_batch[1::2] == micro_batch[0::2] + 1).all()
    if len(rows) // sizes["unit_size"] >= len(flat):
        assert all(len(micro_batch) for micro_batch in flat)
    again = plan_step(rows, lengths, **sizes)
    assert all(
        np.array_equal(a, b) for one, two in zip(plan, again, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_tokens_are_balanced_over_ranks():
    """Log-normal lengths, 512 rows over 8 ranks x 8 micro-batches: the busiest rank within 2 % of the mean (C5)."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 512).astype(np.int64) + 1
    plan = plan_step(np.arange(512), lengths, data_parallel_size=8, micro_batch_size=8, unit_size=1)
    tokens = np.array([sum(lengths[rows].sum() for rows in rank) for rank in plan])
    assert tokens.max() / tokens.mean() < 1.02
    in_order = lengths.reshape(8, 64).sum(axis=1)
    assert in_order.max() / in_order.mean() > 1.1


def test_an_epochs_tail_smaller_than_the_ranks_marks_empty_micro_batches():
    plan = plan_step(np.array([4, 9]), np.full(10, 5), data_parallel_size=4, micro_batch_size=2, unit_size=1)
    assert sorted(len(rank[0]) for rank in plan) == [0, 0, 1, 1]


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
