"""FP8 in tensorwise scaling: log pi shows who shares a micro-batch, and a reference for each epoch takes it out."""

from pathlib import Path

from tests.distributed.test_reference_per_epoch import assert_drift_is_reported_and_taken_out, reported


def test_fp8_drifts_with_the_micro_batches_and_not_with_a_reference_of_its_own(
    hf: Path, megatron: Path, tmp_path: Path
) -> None:
    flags = "--params-dtype bfloat16 --transformer-impl transformer_engine --fp8 hybrid --fp8-recipe tensorwise"
    once, _ = assert_drift_is_reported_and_taken_out(megatron, hf, tmp_path, flags)
    assert 0.001 < reported(once)[3] < 0.1
