"""Runs with adapters: what they begin with, save, resume from and refuse, by the script itself on real gloo ranks.

Gradients are in test_adapter_layouts.py. Not shown here: CUDA, Transformer Engine, FP8.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.checkpoints import distcp
from megatron_sppo.checkpoints.adapter_file import adapted_modules, read_adapter
from megatron_sppo.checkpoints.distcp import DistcpReader
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.model_file import read_architecture
from tests.distributed.conftest import all_layouts, write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import FULL, OVERLAP, PP2, SHARDED, SP, TP2, VPP2
from tests.distributed.test_async_saves import live_and_die, numbers
from tests.distributed.test_pretrain import forget_after, losses, metrics, responses
from tests.distributed.worlds import pretrain
from tests.models import MIXTURES, tiny_llama

BASE = "--params-dtype float32 --lr 3e-3 --eta 100 --global-batch-size 8 --micro-batch-size 2 --no-tensorboard"
LORA = "--lora-rank 4 --lora-alpha 8"
RESUMED = "--num-epochs 2 --save-interval 3"
"""8 steps, five of them after the checkpoint that a run is taken back to, in two epochs."""
KILLS = 3
"""Of the writer that test_async_saves kills more often; adapters differ in what is written."""

Start = Callable[..., list[int]]


def refusal(argv: list[str]) -> str:
    """Run the script, which refuses its settings -> the last line on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert pretrain(argv) == 2
    return said.getvalue().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    import_checkpoint(tiny_llama(root / "hf", num_hidden_layers=4, **MIXTURES["qwen3_moe"]), root / "megatron")
    return root / "megatron"


@pytest.fixture
def run(untied: Path, tmp_path: Path) -> Start:
    """Start the script in a world of ranks -> exit codes. The data are kept, and the reference beside them."""

    def start(
        save: Path,
        flags: str,
        *,
        world_size: int = 1,
        load: Path = untied,
        data_of_load: Path | None = None,
        function: Callable[[list[str]], Any] = pretrain,
    ) -> list[Any]:
        data = tmp_path / f"data_{(data_of_load or load).parent.name}"
        if not data.exists():
            write_dataset(data, untied.parent / "hf")
        places = ["--load", str(load), "--data", str(data), "--save", str(save)]
        return run_ranks(function, world_size, [*places, *BASE.split(), *LORA.split(), *flags.split()])

    return start


def data_of(save: Path, load: Path) -> Path:
    return save.parent / f"data_{load.parent.name}"


def fingerprint(data: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((data / "reference.json").read_text())["fingerprint"]
    return found


def test_training_is_the_same_in_every_layout_from_the_first_a_on(run: Start, mixture: Path, tmp_path: Path) -> None:
    """A is drawn by module, layer and expert, so that runs of all layouts begin alike; so does the gradient's norm."""
    for model, layouts in {
        None: {
            "TP2 SP PP2": (4, f"{TP2} {SP} {PP2}"),
            "VPP2 recompute": (2, f"{VPP2} {FULL}"),
            "DP2 gathered late": (2, f"{SHARDED} {OVERLAP} overlap_param_gather=true"),
        },
        mixture: {
            "EP2 TP2 SP sharded": (4, f"--expert-model-parallel-size 2 {TP2} {SP} {SHARDED}"),
            "experts over TP2 SP": (2, f"{TP2} {SP}"),
        },
    }.items():
        load = {} if model is None else {"load": model}
        directory = tmp_path / ("dense" if model is None else "mixture")
        assert run(directory / "one", "", **load) == [0]
        expected = metrics(directory / "one")
        assert expected[-1]["loss"] < 0.95 * expected[0]["loss"]
        for name, (world_size, flags) in layouts.items():
            assert run(directory / name, flags, world_size=world_size, **load) == [0] * world_size
            found = metrics(directory / name)
            for column in ("loss", "grad_norm"):
                assert [line[column] for line in found] == pytest.approx([line[column] for line in expected], rel=1e-4)


def test_the_first_reference_is_the_base_s_and_the_next_run_s_the_adapters(
    run: Start, untied: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(first, "") == [0]
    assert metrics(first)[0]["sppo/ref_drift_step0"] == 0
    assert metrics(first)[0]["loss"] == pytest.approx(metrics(first)[0]["sppo/target_rms"] ** 2)
    data = data_of(first, untied)
    assert "adapter" not in fingerprint(data)
    for path in data.glob("reference.*"):
        path.unlink()
    assert run(second, f"{TP2} {SP} --load-adapter {first}", world_size=2) == [0, 0]
    assert metrics(second)[0]["sppo/ref_drift_step0"] == 0
    named = fingerprint(data)["adapter"]
    assert isinstance(named, dict) and (named["rank"], named["alpha"]) == (4, 8.0) and len(named["adapters_hash"]) == 12
    # The same adapters, on the base that they were trained on: the second run's first log pi is the first run's last.
    assert read_adapter(first / "iter_0000004") == read_adapter(second / "iter_0000004")


def test_full_training_s_reference_serves_adapters_that_add_nothing(run: Start, untied: Path, tmp_path: Path) -> None:
    """W x + 0 is W x to the bit."""
    data = write_dataset(tmp_path / f"data_{untied.parent.name}", untied.parent / "hf")
    places = ["--load", str(untied), "--data", str(data), "--save", str(tmp_path / "full")]
    assert run_ranks(pretrain, 1, [*places, *BASE.split()]) == [0]
    written = (data / "reference.json").read_bytes()
    assert run(tmp_path / "adapters", "") == [0]
    assert (data / "reference.json").read_bytes() == written
    assert metrics(tmp_path / "adapters")[0]["sppo/ref_drift_step0"] == 0
    assert losses(tmp_path / "adapters")[0] == losses(tmp_path / "full")[0]


def test_a_checkpoint_holds_adapters_and_their_optimizer_alone(run: Start, untied: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    assert run(save, f"{SHARDED} --train-iters 1 --params-dtype bfloat16", world_size=2) == [0, 0]
    shapes = DistcpReader.open(save / "iter_0000001").shapes()
    architecture, _ = read_architecture(untied)
    content = read_adapter(save / "iter_0000001")
    wanted = {
        module.key(matrix): (architecture.num_layers, *shape)
        for module in adapted_modules(architecture, content.settings.targets)
        for matrix, shape in module.matrices(4).items()
    }
    assert len(wanted) == 14
    weights = {key: shape for key, shape in shapes.items() if not key.startswith((distcp.COMMON_KEY, "optimizer."))}
    assert weights == wanted
    state = {key.removeprefix("optimizer.state.") for key in shapes if key.startswith("optimizer.state.")}
    assert state == {f"{kind}.{key}" for kind in ("exp_avg", "exp_avg_sq", "param") for key in wanted}


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, "--params-dtype bfloat16"),
        (2, f"{SHARDED} --optimizer rmsprop"),
        *all_layouts((4, f"{SHARDED} {TP2} {SP}"), (2, f"{VPP2} --params-dtype bfloat16 --async-save")),
    ],
)
def test_a_run_is_resumed_bit_exactly(run: Start, tmp_path: Path, world_size: int, flags: str) -> None:
    save, flags = tmp_path / "save", f"{flags} {RESUMED}"
    assert run(save, flags, world_size=world_size) == [0] * world_size
    expected, order = numbers(save), responses(save)
    first, second = (sum(line["loss"] for line in epoch) for epoch in (expected[:4], expected[4:]))
    assert len(expected) == 8 and second < first
    forget_after(save, 3)
    assert run(save, flags, world_size=world_size) == [0] * world_size
    assert numbers(save) == expected and responses(save) == order


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, f"{SHARDED} {TP2} {SP}"), (2, f"{SHARDED} {PP2}")),
        *all_layouts(((2, VPP2), (2, f"{TP2} {SP}"))),
    ],
)
def test_a_run_goes_on_in_another_layout(
    run: Start, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    save = tmp_path / "save"
    assert run(save, f"{before[1]} {RESUMED}", world_size=before[0]) == [0] * before[0]
    expected = losses(save)
    forget_after(save, 3)
    assert run(save, f"{after[1]} {RESUMED}", world_size=after[0]) == [0] * after[0]
    assert losses(save)[:3] == expected[:3] and losses(save) == pytest.approx(expected, rel=1e-4)


def test_experts_go_on_in_another_layout(run: Start, mixture: Path, tmp_path: Path) -> None:
    save, experts = tmp_path / "save", f"--expert-model-parallel-size 2 {SHARDED} {RESUMED}"
    assert run(save, experts, world_size=2, load=mixture) == [0, 0]
    expected = losses(save)
    forget_after(save, 3)
    assert run(save, f"{TP2} {SP} {SHARDED} {RESUMED}", world_size=2, load=mixture) == [0, 0]
    assert losses(save) == pytest.approx(expected, rel=1e-4)


def test_kills_in_the_midst_of_saves_lose_nothing(run: Start, untied: Path, tmp_path: Path) -> None:
    steps = f"{LORA} --lr 1e-4 --train-iters {3 * KILLS}"
    run(tmp_path / "whole", steps)
    save = tmp_path / "killed"
    places = ["--load", str(untied), "--data", str(data_of(save, untied)), "--save", str(save)]
    argv = [*places, *BASE.split(), *steps.split(), "--save-interval", "1", "--async-save"]
    assert run_ranks(live_and_die, 1, str(save), 5, KILLS, argv) == [KILLS]
    assert len(list(save.glob("iter_*"))) < 3 * KILLS
    assert run(save, f"{steps} --save-interval 1 --async-save") == [0]
    assert numbers(save) == numbers(tmp_path / "whole")


def test_what_does_not_fit_is_refused(run: Start, untied: Path, mixture: Path, tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other_base"
    begun = "--train-iters 2 --save-interval 1"
    assert run(first, begun) == [0]
    forget_after(first, 1)
    import_checkpoint(tiny_llama(tmp_path / "hf", num_hidden_layers=4, seed=5), other)
    at_first = f"--load-adapter {first}"
    for flags, load, words in (
        (f"{at_first} --lora-rank 8", untied, "Use --lora-rank 4 --lora-alpha 8 --lora-scaling lora --lora-targets q_"),
        (f"{at_first} --params-dtype bfloat16", untied, "Use --params-dtype float32."),
        (at_first, other, "Use --load with the model that they were trained on."),
        (at_first, mixture, "another architecture"),
        ("", first, f"--load-adapter {first} and --lora-rank 4"),
        (f"--load-adapter {untied}", untied, "holds a model and no adapters"),
        ("--lora-targets q_proj experts", untied, "'experts', which is no linear module"),
        ("--lora-dropout 0.1", untied, "Use --lora-dropout 0."),
    ):
        (line,) = run(tmp_path / "refused", flags, load=load, function=refusal)
        assert words in line, line
        assert not list((tmp_path / "refused").glob("iter_*"))
    (line,) = run(first, f"{begun} --lora-rank 2", function=refusal)
    assert "lora_rank was 4, is 2" in line
    (line,) = run(first, begun, load=other, data_of_load=untied, function=refusal)
    assert "Use --load with the model" in line
    shutil.rmtree(other)
    (line,) = run(first, begun, load=other, data_of_load=untied, function=refusal)
    assert str(other) in line
