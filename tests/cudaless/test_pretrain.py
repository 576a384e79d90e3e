"""examples/pretrain_sppo.py whole, on the emulated GPU: reference pass, bfloat16 and FP8 steps, saves, resume.

Each run is the script with its command line, as ranks that a launcher started. Expected values are arithmetic: with
every log-ratio 0 the first loss is the mean square of the targets; a resumed run repeats every number. How fast it goes
and what NVML says is not shown.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import OVERLAP, PP2, SHARDED, SP, TP2
from tests.distributed.test_pretrain import forget_after, metrics, responses
from tests.distributed.worlds import pretrain
from tests.models import tiny_llama

FLAGS = (
    "--params-dtype bfloat16 --transformer-impl transformer_engine --lr 1e-4 --eta 100 --global-batch-size 8 "
    "--micro-batch-size 4 --num-epochs 3 --save-interval 2 --no-tensorboard"
)
"""16 responses in steps of 8, three times: 6 steps, four of them after the checkpoint that a run is taken back to."""
FP8 = "--fp8 hybrid --fp8-recipe"
# (ranks, flags)
RUNS = {
    "bfloat16": (1, ""),
    "tensorwise": (1, f"{FP8} tensorwise"),
    "blockwise": (1, f"{FP8} blockwise"),
    "delayed": (1, f"{FP8} delayed"),
    "tensorwise, sharded optimizer": (2, f"{FP8} tensorwise {SHARDED} --micro-batch-size 2"),
    "sharded optimizer, gathered late": (2, f"{SHARDED} {OVERLAP} overlap_param_gather=true --micro-batch-size 2"),
    "sharded optimizer, saved in the background": (2, f"{SHARDED} --async-save --micro-batch-size 2"),
    "tensorwise, TP2 SP PP2": (4, f"{FP8} tensorwise {TP2} {SP} {PP2}"),
    "full recomputation": (1, f"{FP8} tensorwise --recompute-granularity full"),
}
STATELESS = [name for name, (_, flags) in RUNS.items() if "delayed" not in flags]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 256 channels: shards of two ranks are still multiples of 128 -> a directory with all inputs."""
    root = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf = tiny_llama(root / "hf", num_hidden_layers=2, head_dim=64, dtype="bfloat16", **sizes)
    import_checkpoint(hf, root / "megatron")
    return root


def run(model: Path, tmp_path: Path, name: str) -> list[dict[str, Any]]:
    """Run the script, or go on with what is saved -> its metrics by step."""
    ranks, flags = RUNS[name]
    data, save = tmp_path / "data", tmp_path / "save"
    if not data.exists():
        write_dataset(data, model / "hf", num_prompts=4)
    places = ["--load", str(model / "megatron"), "--data", str(data), "--save", str(save)]
    assert run_ranks(pretrain, ranks, [*places, *FLAGS.split(), *flags.split()]) == [0] * ranks
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "gpu/"))} for line in metrics(save)]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_starts_at_zero_and_resumes_bit_for_bit(name: str, model: Path, tmp_path: Path) -> None:
    whole, order = run(model, tmp_path, name), responses(tmp_path / "save")
    assert len(whole) == 6
    if name in STATELESS:
        assert whole[0]["sppo/ref_drift_step0"] == 0
        assert whole[0]["loss"] == pytest.approx(whole[0]["sppo/target_rms"] ** 2)
    assert ("sppo/fp8_gap" in whole[0]) == ("--fp8" in RUNS[name][1])
    assert whole[0].get("sppo/fp8_gap", 1.0) > 0
    assert whole[-1]["loss"] != whole[1]["loss"]
    forget_after(tmp_path / "save", 2)
    assert run(model, tmp_path, name) == whole
    assert responses(tmp_path / "save") == order
