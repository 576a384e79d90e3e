"""A fault of the kind that only a GPU would show makes the emulated run fail; without one it passes.

The run is examples/pretrain_sppo.py itself: a reference pass and three steps on the same eight responses, in bfloat16
and in FP8, by Transformer Engine's layers. It is held against the same run by torch's layers in bfloat16: what each
response's log-ratio has become by the last step, the gap that FP8 makes, and how often the host waited for the GPU.
"""

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.data.microbatch import MicroBatch
from tests.cudaless import runtime
from tests.cudaless.device import LOG, CudaTensor
from tests.distributed.conftest import write_dataset
from tests.distributed.worlds import pretrain
from tests.models import tiny_llama

FLAGS = (
    "--params-dtype bfloat16 --lr 1e-3 --lr-decay-style constant --lr-warmup-fraction 0 --eta 10 --no-tensorboard "
    "--global-batch-size 8 --micro-batch-size 4 --num-epochs 3"
)
PRECISIONS = {
    "torch": "--transformer-impl torch",
    "bfloat16": "--transformer-impl transformer_engine",
    "fp8": "--transformer-impl transformer_engine --fp8 hybrid",
}
MARGIN = 1.5
APART = {"bfloat16": 0.0096, "fp8": 0.097}
"""Relative norm of the difference of the last log-ratios from the torch layers', as found without a fault."""
FP8_GAP = 0.0103
"""Nats a token, as found without a fault."""
WAITS = Counter({"item: clip_grads.py": 1})
"""At most, in one step of two micro-batches: the gradient's norm decides about the update."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 128 channels -> a directory with all that a run wants."""
    root = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf = tiny_llama(root / "hf", num_hidden_layers=2, head_dim=64, dtype="bfloat16", **sizes)
    import_checkpoint(hf, root / "megatron")
    return root


def run(model: Path, directory: Path, precision: str) -> tuple[dict[str, Any], np.ndarray, Counter[str]]:
    """Run the script -> (first step's metrics, last step's log-ratios, waits of the second step by file)."""
    from megatron_sppo.training import loop

    marks: list[int] = []
    plain = loop._step

    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.append(len(LOG))
        return plain(*args, **kwargs)

    data = write_dataset(directory / "data", model / "hf", num_prompts=2)
    places = ["--load", str(model / "megatron"), "--data", str(data), "--save", str(directory / "save")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", marked)
        assert pretrain([*places, *FLAGS.split(), *PRECISIONS[precision].split()]) == 0
    first = json.loads((directory / "save/metrics.jsonl").read_text().splitlines()[0])
    rows = [json.loads(line) for line in (directory / "save/responses.jsonl").read_text().splitlines()]
    ratios = {(row["group"], row["response"]): row["log_ratio"] for row in rows if row["step"] == 3}
    waits = Counter(f"{wait.what}: {Path(wait.caller.split(':')[0]).name}" for wait in LOG[marks[1] : marks[2]])
    return first, np.array([ratios[key] for key in sorted(ratios)]), waits


@pytest.fixture(scope="module")
def wanted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], np.ndarray]:
    return cache(lambda: run(model, tmp_path_factory.mktemp("torch"), "torch")[1])


def check(model: Path, directory: Path, precision: str, wanted: np.ndarray) -> None:
    """Run, and hold all that the run says against what it should be."""
    first, found, waits = run(model, directory, precision)
    apart = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    print(f"{precision}: {apart:.4f} apart, FP8 gap {first.get('sppo/fp8_gap')}")
    assert first["sppo/ref_drift_step0"] == 0
    assert apart <= MARGIN * APART[precision]
    if precision == "fp8":
        assert FP8_GAP / 3 <= first["sppo/fp8_gap"] <= MARGIN * FP8_GAP
    assert waits <= WAITS, waits - WAITS


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_without_a_fault_the_check_passes(
    precision: str, model: Path, wanted: Callable[[], np.ndarray], tmp_path: Path
) -> None:
    check(model, tmp_path, precision, wanted())


def _moved(patch: pytest.MonkeyPatch, change: Callable[[MicroBatch, MicroBatch], dict[str, Any]]) -> None:
    """Change fields of every micro-batch once it is on the GPU; `change` sees it before and after."""
    plain = MicroBatch.to

    def to(self: MicroBatch, device: Any) -> MicroBatch:
        there = plain(self, device)
        return dataclasses.replace(there, **change(self, there))

    patch.setattr(MicroBatch, "to", to)


def labels_stay_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    _moved(patch, lambda here, there: {"labels_R": here.labels_R})


def cu_seqlens_are_int64(patch: pytest.MonkeyPatch) -> None:
    _moved(patch, lambda here, there: {"cu_seqlens": there.cu_seqlens.long()})


def max_seqlen_is_short(patch: pytest.MonkeyPatch) -> None:
    _moved(patch, lambda here, there: {"max_seqlen": there.max_seqlen - 1})


def sequences_see_each_other(patch: pytest.MonkeyPatch) -> None:
    _moved(
        patch,
        lambda here, there: {"cu_seqlens": there.cu_seqlens[[0, -1]], "max_seqlen": there.tokens.shape[1]},
    )


def a_gpu_tensor_is_read_by_numpy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaTensor, "cpu", lambda self, *_, **__: self)


def a_copy_is_read_before_it_came(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runtime.Event, "synchronize", lambda self: None)


def nccl_is_given_a_cpu_tensor(patch: pytest.MonkeyPatch) -> None:
    from megatron_sppo.training import parallel

    plain = parallel.sum_over_world
    patch.setattr(parallel, "sum_over_world", lambda values: plain(values.cpu()))


def the_host_waits_for_every_micro_batch(patch: pytest.MonkeyPatch) -> None:
    from megatron_sppo.training import forward_step

    plain = forward_step.objective_terms

    def waiting(rows: Any, log_prob_B: Tensor, **kwargs: Any) -> Tensor:
        assert bool(log_prob_B.isfinite().all())
        return plain(rows, log_prob_B, **kwargs)

    patch.setattr(forward_step, "objective_terms", waiting)


def the_head_s_weight_is_stale(patch: pytest.MonkeyPatch) -> None:
    """The head goes on with the weight of its first call, as after a gather that nobody waited for."""
    from megatron_sppo.model import gpt

    plain = gpt.linear_log_probs
    kept: list[Tensor] = []

    def stale(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept.append(weight.detach().clone().requires_grad_())
        return plain(hidden, kept[0], *args, **kwargs)

    patch.setattr(gpt, "linear_log_probs", stale)


def tokens_are_not_padded_for_fp8(patch: pytest.MonkeyPatch) -> None:
    from megatron_sppo.model import config

    patch.setattr(config, "fp8_multiple", lambda config: 1)


def fp8_is_off_without_a_word(patch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer import transformer_block

    patch.setattr(transformer_block, "get_fp8_context", lambda *_, **__: contextlib.nullcontext())


def operands_lack_their_transposes(patch: pytest.MonkeyPatch) -> None:
    """Hopper's FP8 products know one layout alone, so the backward ones read transposes."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    for kind in (Float8Tensor, Float8TensorStorage):
        patch.setattr(kind, "_create_transpose", lambda self: None)
    plain = Float8CurrentScalingQuantizer.set_usage
    patch.setattr(
        Float8CurrentScalingQuantizer,
        "set_usage",
        lambda self, *, rowwise=None, columnwise=None: plain(self, rowwise=rowwise, columnwise=False),
    )


def fp8_values_saturate(patch: pytest.MonkeyPatch) -> None:
    from tests.cudaless.engine import quantize

    plain = quantize.scale_of
    patch.setattr(quantize, "scale_of", lambda *args, **kwargs: 16 * plain(*args, **kwargs))


# fault: (precision, what the failure says)
FAULTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, str]] = {
    labels_stay_on_the_cpu: ("bfloat16", "all tensors to be on the same device"),
    cu_seqlens_are_int64: ("bfloat16", "reads int32"),
    max_seqlen_is_short: ("bfloat16", "illegal memory access"),
    sequences_see_each_other: ("bfloat16", "<= .1.5 . 0.0096."),
    a_gpu_tensor_is_read_by_numpy: ("bfloat16", "Use Tensor.cpu.. first"),
    # Whichever copy is read first: a count of bytes, or the step's loss.
    a_copy_is_read_before_it_came: ("bfloat16", "assert 2 == 0|cannot convert float"),
    nccl_is_given_a_cpu_tensor: ("bfloat16", "No backend type associated with device type cpu"),
    the_host_waits_for_every_micro_batch: ("bfloat16", "item: test_faults.py"),
    the_head_s_weight_is_stale: ("bfloat16", "<= .1.5 . 0.0096."),
    tokens_are_not_padded_for_fp8: ("fp8", "divisible by 8"),
    fp8_is_off_without_a_word: ("fp8", "<= 0.0"),
    operands_lack_their_transposes: ("fp8", "column-wise copy"),
    fp8_values_saturate: ("fp8", "<= .1.5 . 0."),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_with_a_fault_it_fails_for_that_reason(
    fault: Callable[[pytest.MonkeyPatch], None],
    model: Path,
    wanted: Callable[[], np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (precision, reason), truth = FAULTS[fault], wanted()
    fault(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError, OverflowError), match=reason):
        check(model, tmp_path, precision, truth)
