"""Proves of tests/distributed/layouts.py: no pair of choices that can meet is left out, and the cover is a small one.

Pairs are found again here, by asking for every two axes which values meet in any possible layout.
"""

from itertools import combinations, product

import pytest

from tests.distributed import layouts

COVERS = {
    "dense": (layouts.DENSE, layouts.dense_can_be, None, 25),
    "mixture": (layouts.MIXTURE, layouts.mixture_can_be, layouts.OF_MIXTURES, 14),
}


@pytest.mark.parametrize("kind", COVERS)
def test_every_pair_of_values_that_can_meet_is_in_the_cover(kind: str) -> None:
    axes, can_be, of, largest = COVERS[kind]
    possible, cover = layouts.possible(axes, can_be), layouts.pairwise_cover(axes, can_be, of=of)
    wanted = 0
    for one, other in combinations(axes, 2):
        if of is not None and not {one, other} & set(of):
            continue
        for values in product(axes[one], axes[other]):
            can_meet = any((layout[one], layout[other]) == values for layout in possible)
            assert any((layout[one], layout[other]) == values for layout in cover) == can_meet, (one, other, values)
            wanted += can_meet
    assert wanted > 90
    assert len(cover) <= largest < len(possible) / 50
    assert all(can_be(layout) and layouts.world_size(layout) <= layouts.LARGEST_WORLD for layout in cover)


def test_the_cover_is_the_same_each_time_and_names_are_unlike() -> None:
    one, again = (layouts.pairwise_cover(layouts.DENSE, layouts.dense_can_be) for _ in range(2))
    assert one == again
    assert len({layouts.name(layout) for layout in one}) == len(one)


def test_small_covers_are_those_that_one_finds_by_hand() -> None:
    """Four layouts hold the twelve pairs of three binary axes; eight would be all."""
    axes = {"a": (0, 1), "b": (0, 1), "c": (0, 1)}
    assert len(layouts.pairwise_cover(axes, lambda _: True)) in (4, 5)
    assert len(layouts.pairwise_cover({"a": (0, 1), "b": (0, 1)}, lambda _: True)) == 4
    assert layouts.pairwise_cover(axes, lambda layout: layout["a"] == 0, of=("a",)) == [
        {"a": 0, "b": 0, "c": 0},
        {"a": 0, "b": 1, "c": 1},
    ]


def test_a_layout_is_spelled_as_the_training_command_reads_it() -> None:
    layout = {
        "model": "tied", "tensor": 2, "pipeline": "2x2", "context": 1, "data": 1, "sequence": True, "padded": True,
        "recompute": "full", "sharded": True, "overlapped": False, "micro-batch": 2,
    }  # fmt: skip
    assert layouts.flags(layout) == (
        "--micro-batch-size 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--virtual-pipeline-model-parallel-size 2 --sequence-parallel --no-packing --recompute-granularity full "
        "--use-distributed-optimizer"
    )
    assert layouts.name(layout) == "tied TP2 PP2x2 SP padded recompute full sharded of 2"
    assert layouts.world_size(layout) == 4
