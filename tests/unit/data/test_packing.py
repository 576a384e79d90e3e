"""Proves that packs hold every row once and never more than the budget, that they are best-fit decreasing's own, and
that ranks are loaded as longest-processing-time-first says.

Does not prove speed, nor fill at scale: see benchmarks/packing.py.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sppo.data.packing import assign_to_ranks, document_cost, pack, spread_by_cost
from megatron_sppo.errors import DataError

BUDGET = 40
lengths_within_budget = st.lists(st.integers(1, BUDGET), max_size=120)


def naive_best_fit_decreasing(sizes, budget):
    """One by one, scanning all packs for the fullest with room -> their loads."""
    loads = []
    for size in sorted(sizes, reverse=True):
        fitting = [index for index, load in enumerate(loads) if load + size <= budget]
        if fitting:
            best = max(fitting, key=lambda index: loads[index])
            loads[best] += size
        else:
            loads.append(size)
    return loads


@settings(max_examples=300, deadline=None)
@given(lengths_within_budget)
def test_every_row_once_no_pack_over_budget_and_loads_as_the_naive_loop(lengths):
    packs = pack(np.array(lengths, dtype=np.int64), budget=BUDGET)
    assert sorted(row for rows in packs for row in rows.tolist()) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in rows) for rows in packs]
    assert all(0 < load <= BUDGET for load in loads)
    assert sorted(loads) == sorted(naive_best_fit_decreasing(lengths, BUDGET))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, BUDGET // 2), st.integers(1, BUDGET // 2)), max_size=60))
def test_pairs_share_a_pack_side_by_side_winner_first(pairs):
    packs = pack(np.array(pairs, dtype=np.int64).reshape(-1), budget=BUDGET, rows_per_loss=2)
    for rows in packs:
        assert (rows[0::2] % 2 == 0).all() and (rows[1::2] == rows[0::2] + 1).all()
    assert sorted(row for rows in packs for row in rows.tolist()) == list(range(2 * len(pairs)))
    loads = [sum(sum(pairs[row // 2]) for row in rows[0::2]) for rows in packs]
    assert sorted(loads) == sorted(naive_best_fit_decreasing([sum(pair) for pair in pairs], BUDGET))


@settings(max_examples=100, deadline=None)
@given(lengths_within_budget)
def test_the_same_lengths_give_the_same_packs(lengths):
    first, second = (pack(np.array(lengths, dtype=kind), budget=BUDGET) for kind in (np.int64, np.int32))
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in second]


def test_packs_of_a_known_example():
    """Budget 10, lengths 7 6 3 3 1: 7 + 3 fills one pack, 6 + 3 + 1 the other. Next-fit in that order needs three."""
    packs = pack(np.array([3, 6, 7, 1, 3]), budget=10)
    assert sorted(sorted(rows.tolist()) for rows in packs) == [[0, 2], [1, 3, 4]]


def test_large_budgets_and_one_row_a_pack():
    assert [rows.tolist() for rows in pack(np.array([131072, 131072]), budget=131072)] == [[0], [1]]
    assert pack(np.array([], dtype=np.int64), budget=8) == []


def test_what_fits_no_pack_is_refused():
    with pytest.raises(DataError, match=r"row 1 has 9 tokens and a pack holds 8\. Use --seq-length 9\."):
        pack(np.array([3, 9, 4]), budget=8)
    with pytest.raises(DataError, match="rows 2 to 3 have 9 tokens"):
        pack(np.array([3, 5, 4, 5]), budget=8, rows_per_loss=2)
    with pytest.raises(DataError, match="row 1 has 0 tokens"):
        pack(np.array([3, 0]), budget=8)


def test_cost_of_a_document_is_linear_work_and_attention():
    """At the crossover length the two are equal: 2 n. At half of it attention is half: 1.5 n."""
    assert document_cost(np.array([100, 50]), crossover_length=100).tolist() == [200.0, 75.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_attention_of_a_document_costs_the_same_cut_in_two(prompt, response):
    """What a prompt and a response behind it cost together is what they cost in one piece."""
    whole = document_cost(np.array([prompt + response]), crossover_length=70)
    cut = document_cost(np.array([prompt, response]), crossover_length=70, context_N=np.array([0, prompt])).sum()
    assert cut == pytest.approx(float(whole[0]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 7))
def test_every_pack_goes_to_one_rank_and_no_rank_has_more_than_its_share(cost, num_ranks):
    ranks = assign_to_ranks(np.array(cost), num_ranks=num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(itertools.chain(*(members.tolist() for members in ranks))) == list(range(len(cost)))
    assert max(len(members) for members in ranks) == -(-len(cost) // num_ranks)
    assert all(
        [cost[item] for item in members] == sorted((cost[item] for item in members), reverse=True) for members in ranks
    )


def naive_longest_first(cost, sizes, num_bins, capacity):
    """One by one, scanning all bins for the least loaded with room -> items of each bin, or None."""
    bins = [[] for _ in range(num_bins)]
    for item in sorted(range(len(cost)), key=lambda item: -cost[item]):
        open_bins = [b for b in range(num_bins) if sum(sizes[i] for i in bins[b]) + sizes[item] <= capacity]
        if not open_bins:
            return None
        bins[min(open_bins, key=lambda b: (sum(cost[i] for i in bins[b]), b))].append(item)
    return bins


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=40), st.integers(1, 6), st.integers(20, 90))
def test_items_of_unlike_size_go_where_the_naive_loop_puts_them(items, num_bins, capacity):
    cost, sizes = [cost for cost, _ in items], [size for _, size in items]
    found = spread_by_cost(np.array(cost), num_bins=num_bins, capacity=capacity, size_I=np.array(sizes, dtype=np.int64))
    assert (None if found is None else [members.tolist() for members in found]) == naive_longest_first(
        cost, sizes, num_bins, capacity
    )


def test_ranks_of_a_known_example():
    """Costs 8 7 6 5 4 2 on two ranks: 8, 5, 4 against 7, 6 and 2: 17 and 15 (three packs each)."""
    ranks = assign_to_ranks(np.array([2, 8, 4, 7, 5, 6]), num_ranks=2)
    assert [members.tolist() for members in ranks] == [[1, 4, 2], [3, 5, 0]]
