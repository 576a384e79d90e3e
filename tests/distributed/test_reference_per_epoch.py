"""What the first epoch's micro-batches leave in later log-ratios, and that --reference-per-epoch takes it out.

A learning rate of 1e-30 leaves every weight as it was, so that a log-ratio is nothing but the difference between the
micro-batches of a step and those of the reference pass: what `sppo/ref_drift` says. A CPU in float32 has none or next
to none; FP8, which has, is in tests/cudaless.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.indexed import Column
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_pretrain import forget_after
from tests.distributed.worlds import pretrain

FLAGS = (
    "--lr 1e-30 --lr-decay-style constant --eta 100 --global-batch-size 16 --packed-sequence-size 256 --num-epochs 2 "
    "--save-interval 1 --no-tensorboard"
)
"""32 responses in steps of 16: the second epoch begins with step 3."""


def run(megatron: Path, data: Path, flags: str) -> int:
    places = ["--load", str(megatron), "--data", str(data), "--save", f"{data}_save"]
    return run_ranks(pretrain, 1, [*places, *FLAGS.split(), *flags.split()])[0]


def lines(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{data}_save", name).read_text().splitlines()]


def reported(data: Path) -> dict[int, float]:
    """Read sppo/ref_drift -> {step: nats a token}."""
    return {line["step"]: line["sppo/ref_drift"] for line in lines(data, "metrics.jsonl") if "sppo/ref_drift" in line}


def found(data: Path, step: int) -> float:
    """Add up a step's |log-ratios| by its response tokens -> nats a token."""
    dataset = PreferenceDataset(data)
    rows = [row for row in lines(data, "responses.jsonl") if row["step"] == step]
    tokens = sum(int(dataset.response_lengths[row["group"], row["response"]]) for row in rows)
    return sum(abs(row["log_ratio"]) for row in rows) / tokens


def assert_drift_is_reported_and_taken_out(megatron: Path, hf: Path, root: Path, flags: str) -> tuple[Path, Path]:
    """Train with one reference and with one for each epoch, the latter interrupted -> (data of one, of the other)."""
    once, each = (write_dataset(root / name, hf) for name in ("once", "each"))
    assert run(megatron, once, flags) == 0
    assert reported(once) == {3: pytest.approx(found(once, 3), rel=1e-3)}

    flags = f"{flags} --reference-per-epoch"
    assert run(megatron, each, flags) == 0
    assert reported(each) == pytest.approx(reported(once))
    whole = lines(each, "responses.jsonl")
    assert len(whole) == 2 * 32 and all(row["log_ratio"] == 0 for row in whole)
    assert len(Column(each / "reference", np.float32, remedy="").lengths) == 2 * 8  # epochs of as many prompts

    forget_after(Path(f"{each}_save"), 2)
    assert run(megatron, each, flags) == 0
    assert lines(each, "responses.jsonl") == whole
    return once, each


def test_another_epoch_s_micro_batches_are_told_apart_and_what_is_gone_is_not_computed_again(
    untied: Path, tmp_path: Path
) -> None:
    flags = "--params-dtype float32"
    once, each = assert_drift_is_reported_and_taken_out(untied, untied.parent / "hf", tmp_path, flags)
    for data in (once, each):
        forget_after(Path(f"{data}_save"), 3)
    # pi_t has moved on: what was computed of it can be neither more nor other than it was.
    assert run(untied, each, f"{flags} --reference-per-epoch --num-epochs 3") == 2
    assert run(untied, each, flags) == 2
    assert run(untied, once, f"{flags} --reference-per-epoch") == 2
