"""Proves: the statistics of `compare_logits` are the formulas in its docstring, and NaN is never a pass."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.errors import ConversionError
from megatron_sppo.verification.logits import THRESHOLDS, compare_logits
from megatron_sppo.verification.verify import _faults, enforce, verify
from tests.models import tiny_llama


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


PROJECTION = "model.layers.0.mlp.down_proj.weight"


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edited(hf: Path) -> None:
        tensors = load_file(hf / "model.safetensors")
        change(tensors)
        save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})

    return edited


def reconfigure(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def spell_differently(hf: Path) -> None:
    """Save the tokenizer's files again as other versions would: other order, other white space, the same meaning."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((hf / name).read_text())
        (hf / name).write_text(json.dumps(dict(reversed(content.items()))))


def lose_a_token(hf: Path) -> None:
    content = json.loads((hf / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, other = [token for token in vocab if len(token) == 1][:2]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (hf / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [
        (
            edit(lambda t: t.update({PROJECTION: t[PROJECTION].T.contiguous()})),
            r"tensors differ, the first is .*down",
        ),
        (edit(lambda t: t.pop(PROJECTION)), r"tensors differ, .*The weights in .* are damaged or of another model"),
        (
            edit(lambda t: t.update(stray=torch.ones(2))),
            r"1 tensors of the Hugging Face .* not in it.*stray",
        ),
        (edit(lambda t: t[PROJECTION].add_(1e-3)), r"tensors differ, .*Convert again"),
        (reconfigure, r"layernorm_epsilon is 0\.5 in config.json.*config\.json was changed after the import"),
        (lose_a_token, r"the tokenizers differ.*put the tokenizer's files right"),
        (lambda hf: (hf / "tokenizer.json").write_text("{"), r"tokenizer\.json is damaged"),
        (spell_differently, None),
    ],
    ids=["transposed", "missing", "extra", "changed", "config", "tokenizer", "tokenizer damaged", "spelling"],
)
def test_every_difference_is_a_verdict_by_name(
    damage: Callable[[Path], Any], verdict: str | None, tmp_path: Path
) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")
    damage(hf)
    if verdict is None:
        assert verify(hf, tmp_path / "megatron", dtype="float32")["faults"] == []
        return
    with pytest.raises(ConversionError, match=verdict):
        enforce(verify(hf, tmp_path / "megatron", dtype="float32"))
