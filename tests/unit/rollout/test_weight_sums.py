"""Proves: a weight's sum is the sum over any cut of it, changes with every number, and is that of the formula."""

import itertools

import pytest
import torch

from megatron_sppo.rollout import weight_sums
from megatron_sppo.rollout.weight_sums import added, can_be_summed, weight_sum

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def splitmix(state: int) -> int:
    """Mix as SplitMix64 does (Steele, Lea, Flood 2014), in Python's integers; shifts keep the sign, as torch's do."""

    def shifted(value: int, count: int) -> int:
        signed = value - (1 << 64) if value >> 63 else value
        return (value ^ (signed >> count)) % (1 << 64)

    state = shifted(state * 0x9E3779B97F4A7C15 % (1 << 64), 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    state = shifted(state, 27) * 0x94D049BB133111EB % (1 << 64)
    return shifted(state, 31)


def test_the_sum_is_that_of_the_formula() -> None:
    weight = torch.randn(5, 7)
    bits = weight.view(torch.int32).tolist()
    halves = []
    for rows, columns in ((0, 1), (2, 3)):
        factor = {kind: [splitmix(i + kind * (1 << 60)) % (1 << 32) | 1 for i in range(7)] for kind in (rows, columns)}
        total = sum(factor[rows][r] * bits[r][c] * factor[columns][c] for r in range(5) for c in range(7))
        halves.append(total % (1 << 32))
    assert weight_sum(weight) == halves[0] << 32 | halves[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_add_up_however_they_are_cut(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 90).to(dtype)
    whole = weight_sum(weight)
    rows, columns = (0, 1, 30, 70), (0, 45, 90)
    parts = [
        {"w": (weight_sum(weight[a:b, c:d], first_row=a, first_column=c), (b - a) * (d - c))}
        for (a, b), (c, d) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns))
    ]
    assert added(parts) == {"w": (whole, 6300)}
    monkeypatch.setitem(weight_sums._BLOCK_NUMBERS, "cpu", 100)
    assert weight_sum(weight) == whole
    bias = weight[0]
    shares = [{"b": (weight_sum(bias[:8]), 8)}, {"b": (weight_sum(bias[8:], first_row=8), 82)}]
    assert added(shares) == {"b": (weight_sum(bias), 90)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_least_change_of_any_number_and_two_numbers_changed_for_each_other_show(dtype: torch.dtype) -> None:
    # These: others may be too small for full precision, or be neighbours that are equal once rounded.
    weight = torch.randn(9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight_sum(weight)
    for row, column in itertools.product(range(9), range(11)):
        other = weight.clone()
        other[row, column] = torch.nextafter(other[row, column], torch.tensor(10.0, dtype=dtype))
        assert weight_sum(other) != before
    for first, second in itertools.pairwise(itertools.product(range(9), range(11))):
        other = weight.clone()
        other[first], other[second] = weight[second], weight[first]
        assert weight_sum(other) != before


def test_zeros_of_both_signs_and_numbers_too_small_for_full_precision_count_alike() -> None:
    for dtype in DTYPES:
        tiny = torch.finfo(dtype).tiny
        assert weight_sum(torch.tensor([0.0, -0.0, tiny / 2, -tiny / 2], dtype=dtype)) == 0
        assert weight_sum(torch.tensor([0.0, tiny], dtype=dtype)) != 0


def test_quantized_weights_have_no_sum() -> None:
    assert all(can_be_summed(torch.zeros(1, dtype=dtype)) for dtype in DTYPES)
    others = (torch.float8_e4m3fn, torch.int8, torch.int32, torch.float64)
    assert not any(can_be_summed(torch.zeros(1, dtype=dtype)) for dtype in others)
