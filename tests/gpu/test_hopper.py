"""What only a Hopper GPU can prove: Transformer Engine's layers compute the model, in bfloat16 and in FP8.

Truth is Hugging Face's model in float64 on the same (bfloat16) weights, one unpadded sequence at a time. Gaps are in
nats a response token, means over the batch; distances are relative norms of the gradient. A bound is MARGIN times what
the emulated GPU (tests/cudaless) finds, which rounds as Hopper does and adds in another order. An H200 is within them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pynvml
import pytest
import torch
from safetensors.torch import load_file

from megatron_sppo.conversion.convert import export_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.objective import linear_log_probs
from tests.distributed import worlds
from tests.distributed.truth import ETA, Truth, reference_of

pytestmark = [pytest.mark.gpu]

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = ["--params-dtype", "bfloat16", "--lr", "1e-3", "--eta", str(ETA), "--global-batch-size", "16"]
ENGINE = ["--transformer-impl", "transformer_engine", "--micro-batch-size", "4"]
FP8 = [*ENGINE, "--fp8", "hybrid", "--fp8-recipe"]

MARGIN = 1.5
# (gap, distance) under tests/cudaless, torch 2.13: the larger of megatron-core 0.16.1's and 0.19.2's
EMULATED = {
    "Hugging Face": (0.0039, 0.0245),
    "torch spec": (0.0053, 0.0344),
    "tensorwise": (0.0548, 0.335),
    "blockwise": (0.0700, 0.346),
    "delayed": (0.0715, 0.346),
    # Nothing there, where one algorithm serves all; GPU kernels may differ by as much as Hugging Face's sums do.
    "--no-packing": (0.0039, 0.0245),
    "selective": (0.0039, 0.0245),
    "full": (0.0039, 0.0245),
}


def first_step(megatron: Path, data: Path, directory: Path, flags: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the first step's log-probabilities and gradient -> (what the rank returns, gradient by exported name)."""
    reference = reference_of(PreferenceDataset(data))
    result = worlds.first_step(str(megatron), str(data), reference, str(directory / "gradient"), [*BASE, *flags])
    exported = export_checkpoint(directory / "gradient", directory / "hf")
    return result, load_file(exported / "model.safetensors")


def gap_per_token(first: dict[str, Any], second: dict[str, Any], data: Path) -> float:
    """Add up |log pi - log pi'| over responses, by their tokens -> nats a token."""
    lengths = PreferenceDataset(data).response_lengths.reshape(-1)[first["rows"]]
    np.testing.assert_array_equal(first["rows"], second["rows"])
    return float(np.abs(first["log_prob"] - second["log_prob"]).sum() / lengths.sum())


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the gradients' difference over the norm of the wanted one."""
    assert set(found) <= set(wanted)
    error = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in found)
    size = sum(float(wanted[name].double().square().sum()) for name in found)
    return (error / size) ** 0.5


def assert_near(found: tuple, wanted: tuple, case: str, data: Path) -> None:
    """Hold (answer, gradient) against another within the bounds of the case."""
    gap, apart = gap_per_token(found[0], wanted[0], data), distance(found[1], wanted[1])
    print(f"{case}: gap {gap:.5f} nats/token, gradient {apart:.5f}")
    assert (gap <= MARGIN * EMULATED[case][0], apart <= MARGIN * EMULATED[case][1]) == (True, True), (gap, apart)


@pytest.fixture(scope="module")
def wide(megatron: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Transformer Engine in bfloat16, packed."""
    return first_step(megatron, data, tmp_path_factory.mktemp("wide"), ENGINE)


def test_bfloat16_is_hugging_face_s_model(wide: tuple, hf: Path, megatron: Path, data: Path) -> None:
    wanted = Truth(hf=hf, megatron=megatron, data=data).hugging_face(wide[0]["rows"])
    assert_near(wide, (wanted, wanted["gradient"]), "Hugging Face", data)


def test_both_layer_specs_agree(wide: tuple, megatron: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--transformer-impl", "torch", "--micro-batch-size", "4"]
    assert_near(wide, first_step(megatron, data, tmp_path, flags), "torch spec", data)


@pytest.mark.parametrize(
    "flags",
    [["--no-packing"], ["--recompute-granularity", "selective"], ["--recompute-granularity", "full"]],
    ids=" ".join,
)
def test_padding_and_recomputation_change_nothing(
    flags: list[str], wide: tuple, megatron: Path, data: Path, tmp_path: Path
) -> None:
    assert_near(first_step(megatron, data, tmp_path, [*ENGINE, *flags]), wide, flags[-1], data)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "delayed"])
def test_fp8_stays_near_bfloat16(recipe: str, wide: tuple, megatron: Path, data: Path, tmp_path: Path) -> None:
    found = first_step(megatron, data, tmp_path, [*FP8, recipe])
    assert_near(found, wide, recipe, data)
    # Far below it FP8 would have been off: bfloat16's own rounding is 32 times finer than E4M3's.
    assert gap_per_token(found[0], wide[0], data) >= EMULATED[recipe][0] / 3


def nvml_answers() -> bool:
    """Containers may withhold the driver's library, and the emulated GPU has none."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByIndex(0)) > 0
    except pynvml.NVMLError:
        return False


@pytest.mark.parametrize("flags", [ENGINE, [*FP8, "tensorwise"], [*FP8, "blockwise"]], ids=lambda flags: flags[-1])
def test_a_short_run_starts_at_zero_and_lowers_the_loss(
    flags: list[str], megatron: Path, data: Path, tmp_path: Path
) -> None:
    """Four epochs of two steps on the same responses; the first log-ratios are exactly 0; the machine is reported.

    The reference lies beside the responses and belongs to a precision, so each run has a copy of its own.
    """
    shutil.copytree(data, tmp_path / "data")
    paths = ["--load", str(megatron), "--data", str(tmp_path / "data"), "--save", str(tmp_path / "new")]
    assert worlds.pretrain([*paths, *BASE, *flags, "--num-epochs", "4", "--lr", "1e-5", "--no-tensorboard"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["sppo/ref_drift_step0"] == 0.0
    losses = [step["loss"] for step in steps]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert steps[0]["perf/tflops_per_gpu"] > 0
    assert (steps[0].get("gpu/power_watts", 0.0) > 0) == nvml_answers()
    assert ("sppo/fp8_gap" in steps[0]) == ("--fp8" in flags)


def test_a_conversion_is_verified_by_transformer_engine_s_model(hf: Path, megatron: Path) -> None:
    tool = [
        sys.executable,
        str(REPOSITORY / "tools/convert.py"),
        "verify",
        "--hf",
        str(hf),
        "--megatron",
        str(megatron),
    ]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("chunk_size", [None, 100])
def test_the_head_is_float64_s_within_bfloat16(chunk_size: int | None) -> None:
    """1000 tokens, 512 channels, 3000 columns of which 2900 are true: logits of a few nats, in bfloat16 products."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 512, generator=generator).bfloat16()
    weight = (torch.randn(3000, 512, generator=generator) / 16).bfloat16()
    labels = torch.randint(2900, (1000,), generator=generator)
    grad = torch.randn(1000, generator=generator)
    ours = [tensor.cuda().requires_grad_() for tensor in (hidden, weight)]
    found = linear_log_probs(*ours, labels.cuda(), chunk_size=chunk_size, vocab_size=2900)
    found.backward(grad.cuda())
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logits = exact[0] @ exact[1][:2900].T
    wanted = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    wanted.backward(grad.double())
    assert (found.detach().cpu().double() - wanted.detach()).abs().max() <= 0.05
    for mine, true in zip(ours, exact, strict=True):
        assert float((mine.grad.cpu().double() - true.grad).norm() / true.grad.norm()) <= 0.01
