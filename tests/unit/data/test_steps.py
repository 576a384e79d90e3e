"""Proves of divided steps on random batches: nothing lost or doubled, the budget held, units whole, equal counts.

How full and how even micro-batches come out at scale is measured in benchmarks/packing.py.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_sppo.data.packing import pack
from megatron_sppo.data.selection import TrainingIndex
from megatron_sppo.data.steps import (
    Units,
    divide_shared_step,
    divide_step,
    epoch_order,
    epoch_rows,
    packed_tokens,
    shared_prompt_units,
    step_units,
)

CROSSOVER_LENGTH = 3000.0


def training_index(prompt_lengths: list[int], response_lengths: list[list[int]], *, pairs: bool = False):
    """An index of prompts of these lengths with these responses each."""
    group = np.repeat(np.arange(len(prompt_lengths)), [len(lengths) for lengths in response_lengths])
    lengths = np.array([length for lengths in response_lengths for length in lengths], dtype=np.int64)
    return TrainingIndex(
        group=group,
        response=np.concatenate([np.arange(len(lengths)) for lengths in response_lengths]),
        prompt_lengths=np.array(prompt_lengths, dtype=np.int64)[group],
        response_lengths=lengths,
        pairs=pairs,
    )


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


def test_an_epoch_by_prompts_keeps_the_rows_of_each_side_by_side():
    """Prompts of 2, 4 and 2 rows: the shuffled order of three prompts, each with its rows in file order."""
    index = training_index([5, 5, 5], [[1] * 2, [1] * 4, [1] * 2], pairs=True)
    members = {0: [0, 1], 1: [2, 3, 4, 5], 2: [6, 7]}
    expected = [row for prompt in epoch_order(3, seed=4, epoch=1) for row in members[int(prompt)]]
    assert epoch_rows(index, seed=4, epoch=1, by_prompt=True).tolist() == expected
    pairs = epoch_rows(index, seed=4, epoch=1, by_prompt=False).reshape(-1, 2)
    assert (pairs[:, 1] == pairs[:, 0] + 1).all() and sorted(pairs.reshape(-1).tolist()) == list(range(8))


@st.composite
def steps(draw):
    """A global batch as units: rows, pairs, or prompts' shares; and the sizes that it is divided by for."""
    rows_per_loss = draw(st.sampled_from([1, 2]))
    shared = draw(st.booleans())
    num_prompts = draw(st.integers(1, 20))
    rows_of_prompt = draw(st.lists(st.integers(1, 3), min_size=num_prompts, max_size=num_prompts))
    prompts = draw(st.lists(st.integers(1, 300), min_size=num_prompts, max_size=num_prompts))
    responses = [
        draw(st.lists(st.integers(1, 500), min_size=n * rows_per_loss, max_size=n * rows_per_loss))
        for n in rows_of_prompt
    ]
    index = training_index(prompts, responses, pairs=rows_per_loss == 2)
    by_tokens = shared or draw(st.booleans())
    sizes = {"data_parallel_size": draw(st.integers(1, 8)), "count_multiple": draw(st.sampled_from([1, 1, 4]))}
    multiple = 1 if shared else draw(st.sampled_from([1, 4]))
    if by_tokens:
        sizes["packed_sequence_size"] = draw(st.integers(1608, 4000))
    else:
        sizes["micro_batch_size"] = rows_per_loss * draw(st.integers(1, 5))
    rows = epoch_rows(index, seed=draw(st.integers(0, 9)), epoch=0, by_prompt=shared)
    return index, rows, {"rows_per_loss": rows_per_loss, "crossover_length": CROSSOVER_LENGTH}, multiple, shared, sizes


def divide(index, rows, settings, multiple, shared, sizes):
    if shared:
        return divide_shared_step(index, rows, **settings, **sizes)
    return divide_step(step_units(rows, index.lengths, document_multiple=multiple, **settings), **sizes)


@hypothesis_settings(max_examples=200, deadline=None)
@given(steps())
def test_a_divided_step_holds_every_row_once_in_bounded_equal_and_whole_micro_batches(step):
    index, rows, settings, multiple, shared, sizes = step
    shares = divide(*step)

    def rounded_up(count: int) -> int:
        return -(-count // sizes["count_multiple"]) * sizes["count_multiple"]

    num_ranks, (num_micro_batches,) = sizes["data_parallel_size"], {len(rank) for rank in shares}
    flat = [micro_batch for rank in shares for micro_batch in rank]
    assert len(shares) == num_ranks and sorted(np.concatenate(flat).tolist()) == sorted(rows.tolist())
    if "micro_batch_size" in sizes:
        assert num_micro_batches == rounded_up(-(-len(rows) // (num_ranks * sizes["micro_batch_size"])))
        assert all(len(micro_batch) <= sizes["micro_batch_size"] for micro_batch in flat)
        if len(rows) // settings["rows_per_loss"] >= len(flat):
            assert all(len(micro_batch) for micro_batch in flat)
    else:
        budget = sizes["packed_sequence_size"]
        layout = {"share_prompts": shared, "document_multiple": multiple}
        assert max(packed_tokens(index, micro_batch, **layout) for micro_batch in flat) <= budget
        if not shared:
            units = step_units(rows, index.lengths, document_multiple=multiple, **settings)
            assert num_micro_batches == rounded_up(-(-len(pack(units.num_tokens, budget=budget)) // num_ranks))
    if settings["rows_per_loss"] == 2:
        for micro_batch in flat:
            assert (micro_batch[0::2] % 2 == 0).all() and (micro_batch[1::2] == micro_batch[0::2] + 1).all()
    if shared:  # no micro-batch holds a prompt twice
        for micro_batch in flat:
            changes = int((np.diff(index.group[micro_batch]) != 0).sum()) + (len(micro_batch) > 0)
            assert changes == len(set(index.group[micro_batch].tolist()))
    assert all(
        np.array_equal(a, b)
        for one, two in zip(shares, divide(*step), strict=True)
        for a, b in zip(one, two, strict=True)
    )


@hypothesis_settings(max_examples=100, deadline=None)
@given(steps(), st.integers(0, 30))
def test_a_prompts_rows_stay_together_unless_a_micro_batch_cannot_hold_them(step, num_split):
    """Tokens by the definition: each prompt of a unit once, each response once. The split prompts are the shortest."""
    index, rows, settings, _, shared, sizes = step
    if not shared:
        return
    capacity = sizes["packed_sequence_size"]
    units = shared_prompt_units(index, rows, capacity=capacity, num_split=num_split, **settings)
    assert sorted(np.concatenate(units.rows).tolist()) == sorted(rows.tolist())
    whole, split = [], []
    for members, num_tokens in zip(units.rows, units.num_tokens, strict=True):
        (prompt,) = set(index.group[members].tolist())
        length = int(index.prompt_lengths[members[0]])
        assert num_tokens == length + index.response_lengths[members].sum() <= capacity
        of_prompt = index.group == prompt
        if len(members) == of_prompt.sum() > settings["rows_per_loss"]:
            whole.append(length)
        elif length + index.response_lengths[of_prompt].sum() <= capacity and len(members) < of_prompt.sum():
            assert len(members) == settings["rows_per_loss"]
            split.append(length)
    assert num_split or not split
    assert not whole or not split or max(split) <= min(whole)


def test_prompts_are_split_where_that_evens_the_ranks():
    """Three prompts of 10 with four responses of 20 on two ranks, by tokens: whole, 180 against 90. With one of them
    split, two of its responses lie on either side: 90 + 50 each.
    """
    index = training_index([10] * 3, [[20] * 4] * 3)
    sizes = {"data_parallel_size": 2, "packed_sequence_size": 1000}
    shares = divide_shared_step(index, np.arange(12), rows_per_loss=1, crossover_length=np.inf, **sizes)
    assert [packed_tokens(index, rank[0], share_prompts=True) for rank in shares] == [140, 140]


def test_prompts_fewer_than_the_ranks_are_not_left_whole():
    """Two prompts on four ranks: a response of each on every rank, 60, in place of 90 on two ranks and none on two."""
    index = training_index([10] * 2, [[20] * 4] * 2)
    sizes = {"data_parallel_size": 4, "packed_sequence_size": 1000}
    shares = divide_shared_step(index, np.arange(8), rows_per_loss=1, crossover_length=np.inf, **sizes)
    assert [packed_tokens(index, rank[0], share_prompts=True) for rank in shares] == [60] * 4


def test_tokens_of_a_row_of_documents():
    """Prompt 5 with responses 3 and 9, prompt 2 with response 1: (5 + 3) + (5 + 9) + (2 + 1), or prompts once."""
    index = training_index([5, 2], [[3, 9], [1]])
    rows = np.array([1, 0, 2])
    assert packed_tokens(index, rows) == 25
    assert packed_tokens(index, rows, document_multiple=4) == 16 + 8 + 4
    assert packed_tokens(index, rows, share_prompts=True) == 5 + 9 + 3 + 2 + 1
    assert packed_tokens(index, np.empty(0, dtype=np.int64), share_prompts=True) == 0


def test_cost_of_shared_prompts_is_what_is_computed_once():
    """Prompt 10, responses 4 and 6, crossover at 100: 10 (1 + .10) + 4 (1 + .04 + .20) + 6 (1 + .06 + .20) = 23.52."""
    index = training_index([10], [[4, 6]])
    units = shared_prompt_units(index, np.array([0, 1]), rows_per_loss=1, capacity=100, crossover_length=100)
    assert units.cost.tolist() == pytest.approx([11 + 4.96 + 7.56])
    assert units.num_tokens.tolist() == [20]


def test_tokens_are_balanced_over_ranks():
    """Log-normal lengths, 512 rows over 8 ranks x 8 micro-batches: the busiest rank within 2 % of the mean (C5)."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 512).astype(np.int64) + 1
    units = step_units(np.arange(512), lengths, rows_per_loss=1)
    shares = divide_step(units, data_parallel_size=8, micro_batch_size=8)
    tokens = np.array([sum(lengths[rows].sum() for rows in rank) for rank in shares])
    assert tokens.max() / tokens.mean() < 1.02
    in_order = lengths.reshape(8, 64).sum(axis=1)
    assert in_order.max() / in_order.mean() > 1.1


def test_ranks_are_even_though_packs_are_few():
    """Nine packs for eight ranks: two micro-batches each, and not one rank with two full ones beside seven with one."""
    lengths = np.full(36, 250)
    units = step_units(np.arange(36), lengths, rows_per_loss=1, crossover_length=1e5)
    assert len(pack(lengths, budget=1000)) == 9
    shares = divide_step(units, data_parallel_size=8, packed_sequence_size=1000)
    assert {len(rank) for rank in shares} == {2}
    tokens = [sum(lengths[rows].sum() for rows in rank) for rank in shares]
    assert max(tokens) == 1250  # 36 rows of 250 over eight ranks: four with five rows, four with four


def test_full_packs_stay_as_best_fit_decreasing_left_them():
    """Budget 10, lengths 6 5 5 4 on two ranks: longest first to the lightest gives 6 + 4 and 5 + 5; 7 5 4 3 1 would not
    fit that way (7 + 1, 5 + 4, and 3 nowhere), best fit does: 7 + 3, 5 + 4 + 1."""
    for lengths, expected in ([6, 5, 5, 4], [[0, 3], [1, 2]]), ([7, 5, 4, 3, 1], [[0, 3], [1, 2, 4]]):
        units = Units(
            rows=[np.array([row]) for row in range(len(lengths))],
            num_tokens=np.array(lengths),
            cost=np.array(lengths, dtype=float),
        )
        shares = divide_step(units, data_parallel_size=2, packed_sequence_size=10)
        assert sorted(sorted(rank[0].tolist()) for rank in shares) == expected


def test_an_epochs_tail_smaller_than_the_ranks_marks_empty_micro_batches():
    units = step_units(np.array([4, 9]), np.full(10, 5), rows_per_loss=1)
    for sizes in {"micro_batch_size": 2}, {"packed_sequence_size": 100}:
        shares = divide_step(units, data_parallel_size=4, **sizes)
        assert sorted(len(rank[0]) for rank in shares) == [0, 0, 1, 1]
