"""Proves the tests that experiments are judged by, against arithmetic."""

import pytest

from benchmarks.comparisons import bootstrap_interval, holm, sign_flip_p


def test_the_sign_flip_test_counts_the_ways_to_flip_signs() -> None:
    """Of 1, 1, 1 two of eight ways reach 3; of 3, -1, 1 those with 3+1+1, 3-1+1, 3+1-1, and their mirror images."""
    assert sign_flip_p([1, 1, 1]) == 2 / 8
    assert sign_flip_p([3, -1, 1]) == 6 / 8
    assert sign_flip_p([0.0, 0.0]) == 1
    assert sign_flip_p([0.2] * 5) == 2 / 32


def test_many_differences_are_flipped_at_random_and_agree_with_the_normal_law() -> None:
    """A mean of n differences of +-1 has z = mean sqrt(n): 60 of 100 is 2 standard deviations, p about 0.057."""
    assert sign_flip_p([1] * 60 + [-1] * 40) == pytest.approx(0.057, abs=0.008)
    assert sign_flip_p([1] * 100) == 1 / 20_001


def test_holm_multiplies_by_the_number_that_is_left_and_never_falls() -> None:
    """0.01 * 3, 0.02 * 2, then 0.03 * 1 which is held at 0.04 (Holm 1979)."""
    assert holm({"b": 0.03, "a": 0.01, "c": 0.02}) == pytest.approx({"b": 0.04, "a": 0.03, "c": 0.04})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_the_interval_of_equal_values_is_the_value_and_of_a_coin_about_two_standard_errors() -> None:
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    low, high = bootstrap_interval([0.0, 1.0] * 50)
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
