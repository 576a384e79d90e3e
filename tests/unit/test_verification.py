"""Proves: the statistics of `compare_logits` are the formulas in its docstring, and NaN is never a pass."""

import math
from typing import Any

import pytest
import torch

from megatron_sppo.errors import ConversionError
from megatron_sppo.verification import THRESHOLDS, _faults, compare_logits, enforce


def test_equal_logits_differ_by_nothing() -> None:
    logits = torch.randn(5, 11)
    result = compare_logits(logits, logits.clone())
    assert result["max_abs"] == result["mean_abs"] == 0.0
    assert result["max_kl"] == pytest.approx(0.0, abs=1e-15)
    assert result["argmax_agreement"] == 1.0
    assert result["positions"] == 5


def test_kl_is_the_textbooks() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2). A second, equal position halves the mean."""
    p = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    result = compare_logits(p, q)
    assert result["max_kl"] == pytest.approx(expected, rel=1e-6)
    assert result["mean_kl"] == pytest.approx(expected / 2, rel=1e-6)
    assert result["max_abs"] == pytest.approx(math.log(3.0), rel=1e-6)


def test_a_shift_of_all_logits_is_no_divergence() -> None:
    logits = torch.randn(4, 9)
    result = compare_logits(logits, logits + 3.0)
    assert result["max_kl"] == pytest.approx(0.0, abs=1e-7)
    assert result["mean_abs"] == pytest.approx(3.0, rel=1e-6)


def report(**logits: float) -> dict[str, Any]:
    values = {"max_abs": 0.0, "max_logit": 10.0, "mean_kl": 0.0, "argmax_agreement": 1.0, **logits}
    limits = vars(THRESHOLDS["float32"])
    return {
        "hf": "H",
        "megatron": "M",
        "architecture": {"different": []},
        "tensors": {"different": [], "compared": 3},
        "tokenizer": {"ids_same": True, "texts": {}, "different_probes": []},
        "logits": {"dtype": "float32", "thresholds": limits, **values},
    }


@pytest.mark.parametrize("name", ["max_abs", "mean_kl", "argmax_agreement"])
def test_nan_is_a_fault(name: str) -> None:
    assert _faults(report()) == []
    assert len(_faults(report(**{name: math.nan}))) == 1


def test_the_first_fault_is_in_the_error() -> None:
    bad = report(max_abs=1.0, mean_kl=1.0)
    with pytest.raises(ConversionError, match=r"logits differ by up to 1 .*1 more: --json"):
        enforce({**bad, "faults": _faults(bad)})
    enforce({**report(), "faults": []})
