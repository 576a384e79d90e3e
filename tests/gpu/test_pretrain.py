"""examples/pretrain_sppo.py whole, on one GPU: reference pass, bfloat16 and FP8 steps, saves, resume.

Each run is the script with its command line, as a rank that a launcher started. Expected values are arithmetic: with
every log-ratio 0 the first loss is the mean square of the targets; a resumed run repeats every number, where
Transformer Engine leaves out kernels that add in an order of the moment (NVTE_ALLOW_NONDETERMINISTIC_ALGO=0).
tests/cudaless/test_pretrain.py has the runs of several ranks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.test_pretrain import forget_after, metrics, responses
from tests.distributed.worlds import pretrain
from tests.gpu.test_layouts import in_this_process
from tests.models import tiny_llama

pytestmark = [pytest.mark.gpu]

FLAGS = (
    "--params-dtype bfloat16 --transformer-impl transformer_engine --lr 1e-4 --eta 100 --global-batch-size 8 "
    "--micro-batch-size 4 --num-epochs 3 --save-interval 2 --no-tensorboard"
)
"""16 responses in steps of 8, three times: 6 steps, four of them after the checkpoint that a run is taken back to."""
FP8 = "--fp8 hybrid --fp8-recipe"
RUNS = {
    "bfloat16": "",
    "tensorwise": f"{FP8} tensorwise",
    "blockwise": f"{FP8} blockwise",
    "delayed": f"{FP8} delayed",
    "full recomputation": f"{FP8} tensorwise --recompute-granularity full",
    "saved in the background": "--async-save",
    "shared prompts": "--share-prompts --packed-sequence-size 256",
    "adapters": f"{FP8} tensorwise --lora-rank 8",
}
Launch = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 256 channels: shards of two ranks are still multiples of 128 -> a directory with all inputs."""
    root = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf = tiny_llama(root / "hf", num_hidden_layers=2, head_dim=64, dtype="bfloat16", **sizes)
    import_checkpoint(hf, root / "megatron")
    return root


def run(model: Path, tmp_path: Path, flags: str, *, ranks: int, launch: Launch) -> list[dict[str, Any]]:
    """Run the script, or go on with what is saved -> its metrics by step."""
    data, save = tmp_path / "data", tmp_path / "save"
    if not data.exists():
        write_dataset(data, model / "hf", num_prompts=4)
    places = ["--load", str(model / "megatron"), "--data", str(data), "--save", str(save)]
    assert launch(pretrain, ranks, [*places, *FLAGS.split(), *flags.split()]) == [0] * ranks
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "gpu/"))} for line in metrics(save)]


def assert_starts_at_zero_and_resumes(model: Path, tmp_path: Path, flags: str, *, ranks: int, launch: Launch) -> None:
    """Run six steps, take the run back to the second and let it go on: every number and every response again."""
    whole, order = run(model, tmp_path, flags, ranks=ranks, launch=launch), responses(tmp_path / "save")
    assert len(whole) == 6
    if "delayed" not in flags:  # its scales are those of calls before
        assert whole[0]["sppo/ref_drift_step0"] == 0
        assert whole[0]["loss"] == pytest.approx(whole[0]["sppo/target_rms"] ** 2)
    assert ("sppo/fp8_gap" in whole[0]) == ("--fp8" in flags)
    assert whole[0].get("sppo/fp8_gap", 1.0) > 0
    assert whole[-1]["loss"] != whole[1]["loss"]
    forget_after(tmp_path / "save", 2)
    assert run(model, tmp_path, flags, ranks=ranks, launch=launch) == whole
    assert responses(tmp_path / "save") == order


@pytest.mark.parametrize("name", RUNS)
def test_a_run_starts_at_zero_and_resumes_bit_for_bit(name: str, model: Path, tmp_path: Path) -> None:
    assert_starts_at_zero_and_resumes(model, tmp_path, RUNS[name], ranks=1, launch=in_this_process)
