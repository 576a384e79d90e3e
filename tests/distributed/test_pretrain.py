"""The pretraining script on real gloo ranks: same losses in every layout, bit-exact resume, refusals.

Each run is examples/pretrain_sppo.py itself with its command line. Kills by signal are in tests/e2e; that the first
log-ratio is zero in every layout is in test_layouts.py.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.conftest import all_layouts, write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import CP2, OVERLAP, PP2, SHARDED, SP, TP2, VPP2
from tests.distributed.worlds import pretrain

BASE = "--params-dtype float32 --lr 1e-3 --eta 10 --global-batch-size 8 --micro-batch-size 2 --lr-warmup-fraction 0.25"


@pytest.fixture(scope="module")
def untied_data(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged responses without a reference yet: each run takes a copy."""
    return write_dataset(tmp_path_factory.mktemp("data") / "data", untied.parent / "hf")


@pytest.fixture
def run(untied: Path, untied_data: Path, tmp_path: Path):
    """Start the script in a world of ranks -> exit codes; fresh data unless told otherwise."""
    data = tmp_path / "data"
    shutil.copytree(untied_data, data)

    def start(save: Path, flags: str = "", *, world_size: int = 1) -> list[int]:
        argv = ["--load", str(untied), "--data", str(data), "--save", str(save), *BASE.split(), *flags.split()]
        return run_ranks(pretrain, world_size, argv)

    return start


@pytest.fixture(scope="module")
def one_process(untied: Path, untied_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Train on one rank, once for each set of flags -> the losses."""

    @cache
    def train(flags: str = "") -> list[float]:
        root = tmp_path_factory.mktemp("one")
        shutil.copytree(untied_data, root / "data")  # the reference that it leaves there is one rank's
        places = ["--load", str(untied), "--data", str(root / "data"), "--save", str(root / "save")]
        assert run_ranks(pretrain, 1, [*places, *BASE.split(), *flags.split()]) == [0]
        return losses(root / "save")

    return train


def metrics(save: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def losses(save: Path) -> list[float]:
    return [line["loss"] for line in metrics(save)]


def forget_after(save: Path, step: int) -> None:
    """Take a run back to the checkpoint of `step`, as if it had been killed before the next one."""
    for directory in save.glob("iter_*"):
        if int(directory.name.removeprefix("iter_")) > step:
            shutil.rmtree(directory)
    (save / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")


RESUMED = "--num-epochs 2 --save-interval 3 --lr 1e-4 --eta 100"
"""8 steps, five of them after the checkpoint that a run is taken back to, in two epochs; residuals of some 5 nats."""


def responses(save: Path) -> list[tuple[int, int, int]]:
    """Which responses were trained on, in the order of the global batches -> (step, group, response)."""
    lines = [json.loads(line) for line in (save / "responses.jsonl").read_text().splitlines()]
    return [(line["step"], line["group"], line["response"]) for line in lines]


def assert_resumes_bit_exactly(run, save: Path, world_size: int, flags: str) -> None:
    """Run, go back to step 3, run again: every number but the speeds is the same."""
    run(save, f"{flags} {RESUMED}", world_size=world_size)
    expected, order = metrics(save), responses(save)
    assert len(expected) == 8
    forget_after(save, 3)
    assert run(save, f"{flags} {RESUMED}", world_size=world_size) == [0] * world_size
    for line, again in zip(expected, metrics(save), strict=True):
        same = {name: value for name, value in line.items() if not name.startswith("perf/")}
        assert {name: again.get(name) for name in same} == same
    assert responses(save) == order


def assert_resumes_in_another_layout(run, save: Path, before: tuple[int, str], after: tuple[int, str]) -> None:
    """Run in one layout (ranks, flags), go back to step 3, go on in the other: same data, same losses to 1e-5."""
    run(save, f"{before[1]} {RESUMED}", world_size=before[0])
    expected, order = losses(save), responses(save)
    forget_after(save, 3)
    assert run(save, f"{after[1]} {RESUMED}", world_size=after[0]) == [0] * after[0]
    assert responses(save) == order and len(order) == 8 * 8
    assert losses(save)[:3] == expected[:3] and len(expected) == 8
    assert losses(save) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, f"{TP2} {SP}"),
        (4, f"{TP2} {PP2}"),
        (2, SHARDED),
        (4, f"{SHARDED} {TP2}"),
        (2, f"{SHARDED} {OVERLAP}"),
        (2, f"{SHARDED} {OVERLAP} overlap_param_gather=true"),
        (2, VPP2),
        (4, f"{CP2} {SHARDED}"),
        (2, f"--optimizer rmsprop {SHARDED}"),
    ],
)
def test_training_gives_the_losses_of_one_process(
    run, one_process, tmp_path: Path, world_size: int, flags: str
) -> None:
    assert run(tmp_path / "many", flags, world_size=world_size) == [0] * world_size
    expected = one_process("--optimizer rmsprop" if "rmsprop" in flags else "")
    assert losses(tmp_path / "many") == pytest.approx(expected, rel=1e-4)


def test_the_first_step_finds_the_reference_unchanged_and_its_loss_is_the_targets(run, tmp_path: Path) -> None:
    """With every log-ratio 0 the loss is mean((eta (w - 1/2))^2), the mean square of the targets."""
    run(tmp_path / "save", f"{TP2} {SP}", world_size=4)
    first = metrics(tmp_path / "save")[0]
    assert first["sppo/ref_drift_step0"] == 0
    assert first["loss"] == pytest.approx(first["sppo/target_rms"] ** 2)


def test_steps_of_an_odd_number_of_micro_batches_are_trained_on_under_the_interleaved_schedule(
    run, tmp_path: Path
) -> None:
    """32 responses in steps of 12, 12 and 8 are 3, 3 and 2 micro-batches of 4; the schedule wants even numbers."""
    sizes = "--global-batch-size 12 --micro-batch-size 4"
    assert run(tmp_path / "one", sizes) == [0]
    assert run(tmp_path / "two", f"{sizes} {VPP2}", world_size=2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(losses(tmp_path / "one")) == 3


def test_training_lowers_the_loss_on_what_it_has_seen(run, tmp_path: Path) -> None:
    run(tmp_path / "save", "--num-epochs 10 --lr 3e-4 --lr-decay-style constant --lr-warmup-fraction 0")
    per_step = losses(tmp_path / "save")
    steps_per_epoch = len(per_step) // 10
    assert sum(per_step[-steps_per_epoch:]) < 0.6 * sum(per_step[:steps_per_epoch])


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, ""),
        (1, "--params-dtype bfloat16"),
        (1, "--optimizer rmsprop"),
        (2, "--use-distributed-optimizer --params-dtype bfloat16"),
        (2, f"{SHARDED} {OVERLAP} overlap_param_gather=true --params-dtype bfloat16"),
        (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_a_resumed_run_is_bit_exact(run, tmp_path: Path, world_size: int, flags: str) -> None:
    assert_resumes_bit_exactly(run, tmp_path / "save", world_size, flags)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, ""), (4, f"{TP2} {PP2} {SP}")),
        ((2, f"{TP2} {SP}"), (2, CP2)),
        ((2, VPP2), (2, "")),
        ((2, SHARDED), (4, f"{SHARDED} {TP2}")),
        ((4, f"{SHARDED} {CP2}"), (4, f"{SHARDED} {PP2}")),
        ((2, f"--optimizer rmsprop {SHARDED}"), (4, f"--optimizer rmsprop {SHARDED} {VPP2}")),
        ((2, f"--params-dtype bfloat16 {PP2}"), (2, "--params-dtype bfloat16")),
        *all_layouts(
            ((1, ""), (2, VPP2)),
            ((2, TP2), (2, PP2)),
            ((2, CP2), (2, f"{TP2} {SP}")),
            ((4, SHARDED), (1, SHARDED)),
            ((2, f"--optimizer rmsprop {PP2}"), (2, f"--optimizer rmsprop {TP2}")),
            ((2, f"--params-dtype bfloat16 {SHARDED}"), (4, f"--params-dtype bfloat16 {SHARDED}")),
        ),
    ],
)
def test_a_run_resumes_in_another_layout(run, tmp_path: Path, before: tuple, after: tuple) -> None:
    assert_resumes_in_another_layout(run, tmp_path / "save", before, after)


def test_a_complete_run_says_so_and_changes_nothing(run, tmp_path: Path) -> None:
    run(tmp_path / "save")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "save").rglob("*") if path.is_file()}
    assert run(tmp_path / "save") == [0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "save").rglob("*") if path.is_file()} == before


def test_what_lies_in_the_save_directory_is_not_written_over(run, untied: Path, tmp_path: Path) -> None:
    for name, text in {
        "config.yaml": "lr: 1.0e-6\n",
        "iter_notes.txt": "mine",
        "iter_1/state": "a self-play run's",
    }.items():
        path = tmp_path / name.replace("/", "-") / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        assert run(tmp_path / name.replace("/", "-")) == [2]
        assert [p.read_text() for p in (tmp_path / name.replace("/", "-")).rglob("*") if p.is_file()] == [text]


def test_what_a_schedule_or_a_start_checkpoint_cannot_be_leaves_nothing(run, untied: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "save", "--train-iters 2 --lr-warmup-fraction 0.9") == [2]
    assert run(tmp_path / "save", "--baseline constant:1e99") == [2]
    assert not (tmp_path / "save").exists()
    shutil.copytree(untied, tmp_path / "imported")
    before = sorted(path.name for path in (tmp_path / "imported").iterdir())
    assert run(tmp_path / "imported") == [2]
    assert sorted(path.name for path in (tmp_path / "imported").iterdir()) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(run, tmp_path: Path) -> None:
    """IPO's target 1 / (2 beta) is 5e29 nats, its square beyond float32: the first loss spoils the first update."""
    assert run(tmp_path / "save", "--objective ipo --beta 1e-30 --save-interval 1") == [2]
    assert not list(tmp_path.glob("save/iter_*"))
    assert losses(tmp_path / "save") == []


@pytest.mark.parametrize("objective", ["sppo_single", "sppo_hard", "dpo", "ipo"])
def test_every_pair_objective_trains_alike_on_one_rank_and_two(run, tmp_path: Path, objective: str) -> None:
    flags = f"--objective {objective}"
    assert run(tmp_path / "one", flags) == [0]
    assert run(tmp_path / "two", flags, world_size=2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_run_resumes_with_another_learning_rate(run, tmp_path: Path) -> None:
    save = tmp_path / "save"
    run(save, "--save-interval 2")
    forget_after(save, 2)
    assert run(save, "--save-interval 2 --lr 5e-4") == [0]
    rates = [line["lr"] for line in metrics(save)]
    assert rates[2] == pytest.approx(5e-4 * (1 - 1 / 3))  # step 3 of 4: one of three steps of decay is done
    assert rates[1] == pytest.approx(1e-3)


@pytest.mark.parametrize("change", ["--eta 20", "--seed 5", "--global-batch-size 4", "--optimizer rmsprop"])
def test_resuming_with_other_settings_is_refused(run, tmp_path: Path, change: str) -> None:
    run(tmp_path / "save", "--save-interval 2")
    assert run(tmp_path / "save", change) == [2]  # a complete run is not one of other settings
    forget_after(tmp_path / "save", 2)
    before = sorted(path.name for path in (tmp_path / "save").iterdir())
    assert run(tmp_path / "save", f"--save-interval 2 {change}") == [2]
    assert sorted(path.name for path in (tmp_path / "save").iterdir()) == before


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (3, "--tensor-model-parallel-size 3"),
        (3, "--pipeline-model-parallel-size 3"),
        (1, "--tensor-model-parallel-size 2"),
        (2, "--micro-batch-size 3"),
        (1, "--seq-length 100000"),
        (1, "--load /nowhere"),
        (1, "--expert-model-parallel-size 2"),
        (1, "--fp8 hybrid"),
        (1, "--transformer-config no_such_field=1"),
        (2, f"{VPP2} --transformer-config overlap_p2p_comm=false"),
        (2, f"{PP2} --transformer-config variable_seq_lengths=true"),
        (1, "--moe-aux-loss-coeff 0.01"),
        (1, "--selection top-bottom:3"),
    ],
)
def test_what_cannot_run_is_refused_with_exit_code_2(run, tmp_path: Path, world_size: int, flags: str) -> None:
    assert run(tmp_path / "save", flags, world_size=world_size) == [2] * world_size
    assert not list(tmp_path.glob("save/iter_*"))


def test_the_newest_checkpoints_stay_and_the_run_goes_on_from_them(run, tmp_path: Path) -> None:
    """8 steps, saved at each: after six the first four are gone; the resumed run's own source goes in its turn."""
    save = tmp_path / "save"
    flags = f"{RESUMED} --save-interval 1"
    run(tmp_path / "all", flags)
    assert run(save, f"{flags} --train-iters 6 --keep-last 2") == [0]
    assert sorted(path.name for path in save.glob("*iter_*")) == ["iter_0000005", "iter_0000006"]
    assert run(save, f"{flags} --keep-last 2") == [0]
    assert sorted(path.name for path in save.glob("*iter_*")) == ["iter_0000007", "iter_0000008"]
    assert (save / "iter_0000008/hf/config.json").read_bytes() == (
        tmp_path / "all/iter_0000008/hf/config.json"
    ).read_bytes()
