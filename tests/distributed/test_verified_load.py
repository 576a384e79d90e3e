"""Proves what a load costs and refuses: each byte read once over the ranks that hold the same, checked as it is read.

Bytes are counted by the file layer of each rank. That resumed runs are bit-exact is in test_pretrain.py.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.checkpoints.distcp import MODEL_ROOTS, read_metadata
from megatron_sppo.checkpoints.items import Items
from megatron_sppo.checkpoints.megatron_checkpoint import write_manifest
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.verification.verify import verify
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.worlds import pretrain
from tests.file_layer import SMALL, counted
from tests.models import tiny_llama

FLAGS = (
    "--params-dtype float32 --lr 1e-3 --eta 10 --global-batch-size 8 --micro-batch-size 2 --use-distributed-optimizer"
)
LAYOUT = ["--use-distributed-optimizer", "--params-dtype", "float32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 5 MB, imported, and two of four steps trained by two ranks -> {hf, megatron, data, save}."""
    root = tmp_path_factory.mktemp("trained")
    hf = tiny_llama(root / "hf", num_hidden_layers=4, hidden_size=128, intermediate_size=512)
    import_checkpoint(hf, root / "megatron")
    places = {"hf": hf, "megatron": root / "megatron", "data": root / "data", "save": root / "save"}
    write_dataset(places["data"], hf)
    assert run_ranks(pretrain, 2, arguments(places, "--train-iters 4 --save-interval 2")) == [0, 0]
    back_to_step_2(places["save"])
    return places


def arguments(places: dict[str, Path], flags: str) -> list[str]:
    named = (f"--{name}={places[key]}" for name, key in (("load", "megatron"), ("data", "data"), ("save", "save")))
    return [*named, *FLAGS.split(), *flags.split()]


def back_to_step_2(save: Path) -> None:
    shutil.rmtree(save / "iter_0000004")
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")


@pytest.fixture
def copied(trained: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of the run, to be damaged."""
    shutil.copytree(trained["save"], tmp_path / "save")
    shutil.copytree(trained["data"], tmp_path / "data")
    return {**trained, "save": tmp_path / "save", "data": tmp_path / "data"}


def item_bytes(checkpoint: Path, *, weights: bool) -> int:
    """Add up the lengths of the items that hold weights, or optimizer, by `.metadata`."""
    places = read_metadata(checkpoint).storage_data
    return sum(
        info.length
        for index, info in places.items()
        if index.fqn.startswith(MODEL_ROOTS) == weights and "_extra_state" not in index.fqn
    )


def load(argv: list[str], checkpoint: str, resumes: bool) -> dict[str, int]:
    """Load weights, or all that a run goes on with -> the bytes that this rank read and hashed for it."""
    from megatron_sppo import config as configuration
    from megatron_sppo.model_file import read_architecture
    from megatron_sppo.training import checkpoint as training_checkpoint
    from megatron_sppo.training import parallel
    from megatron_sppo.training.config import TrainingConfig
    from megatron_sppo.training.optimizer import build_optimizer, build_scheduler
    from megatron_sppo.training.policy import build_policy, weights_hash

    config = configuration.parse(TrainingConfig, name="test", description="", argv=argv)
    parallel.initialize(config.parallel, seed=1)
    policy = build_policy(read_architecture(Path(checkpoint))[0], config.model, config.parallel)
    if resumes:
        optimizer = build_optimizer(policy.chunks, config.optimization, config.model, config.parallel)
        scheduler = build_scheduler(optimizer, config.optimization, train_iters=4)
        with counted() as counts:
            training_checkpoint.resume(Path(checkpoint), policy, optimizer, scheduler)
    else:
        with counted() as counts:
            training_checkpoint.load_weights(policy, Path(checkpoint))
    weights = weights_hash(policy.stages)
    parallel.shut_down()
    return {"read": counts.read, "hashed": counts.hashed, "weights": int(weights, 16)}


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("written", ["saved", "imported"])
def test_each_byte_of_the_weights_is_read_and_hashed_by_one_of_the_ranks(trained, ranks: int, written: str) -> None:
    """Of what two ranks saved, or an import: four read it in parts, and nobody reads optimizer state for weights."""
    checkpoint = trained["save"] / "iter_0000002" if written == "saved" else trained["megatron"] / "iter_0000000"
    wanted = item_bytes(checkpoint, weights=True)
    assert wanted > 3_000_000
    assert (item_bytes(checkpoint, weights=False) > 2 * wanted) == (written == "saved")
    found = run_ranks(load, ranks, arguments(trained, ""), str(checkpoint), False)
    for count in ("read", "hashed"):
        assert wanted <= sum(one[count] for one in found) <= wanted + ranks * SMALL
        assert max(one[count] for one in found) <= wanted / ranks * 1.2 + SMALL
    assert len({one["weights"] for one in found}) == 1


@pytest.mark.parametrize(("ranks", "excess"), [(1, 0), (2, 0), (4, 0.2)])
def test_each_byte_that_a_run_goes_on_with_is_read_and_hashed_once(trained, ranks: int, excess: float) -> None:
    """Twice where the shards of another number of ranks cut an item: that item alone."""
    checkpoint = trained["save"] / "iter_0000002"
    wanted = item_bytes(checkpoint, weights=True) + item_bytes(checkpoint, weights=False)
    found = run_ranks(load, ranks, arguments(trained, ""), str(checkpoint), True)
    for count in ("read", "hashed"):
        assert wanted <= sum(one[count] for one in found) <= wanted * (1 + excess) + ranks * SMALL
        assert max(one[count] for one in found) <= wanted / ranks * (1 + excess) + SMALL


def without_digests(checkpoint: Path) -> None:
    """Make of a checkpoint what earlier versions wrote."""
    for path in checkpoint.glob("*.digests"):
        path.unlink()
    write_manifest(checkpoint)


def test_files_without_digests_are_hashed_whole_by_one_rank_each(copied) -> None:
    checkpoint = copied["save"] / "iter_0000002"
    without_digests(checkpoint)
    sizes = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
    found = run_ranks(load, 2, arguments(copied, ""), str(checkpoint), True)
    assert sizes <= sum(one["hashed"] for one in found) <= sizes + 2 * SMALL
    assert sum(one["read"] for one in found) <= 2 * sizes + 2 * SMALL
    assert run_ranks(pretrain, 2, arguments(copied, "--train-iters 4")) == [0, 0]


def holding(checkpoint: Path, *, weights: bool) -> str:
    """Name the file that holds the longest item of weights, or of optimizer state."""
    places = read_metadata(checkpoint).storage_data.items()
    of_kind = [info for index, info in places if index.fqn.startswith(MODEL_ROOTS) == weights]
    return max(of_kind, key=lambda info: info.length).relative_path


def flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


KINDS: dict[str, Callable[[Path], str]] = {
    "weights": lambda d: holding(d, weights=True),
    "optimizer": lambda d: holding(d, weights=False),
    "digests of weights": lambda d: Path(holding(d, weights=True)).with_suffix(".digests").name,
    "digests of optimizer": lambda d: Path(holding(d, weights=False)).with_suffix(".digests").name,
    ".metadata": lambda d: ".metadata",
    "model.json": lambda d: "model.json",
    "common state": lambda d: "common.pt" if (d / "common.pt").is_file() else "metadata.json",
    "tokenizer": lambda d: "hf/tokenizer.json",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_ends_every_rank_before_a_step(copied, kind: str) -> None:
    checkpoint = copied["save"] / "iter_0000002"
    name = KINDS[kind](checkpoint)
    flip(checkpoint / name, random.Random(kind))
    lines = (copied["save"] / "metrics.jsonl").read_bytes()
    assert run_ranks(refused, 2, arguments(copied, "--train-iters 4"), name) == [2, 2]
    assert (copied["save"] / "metrics.jsonl").read_bytes() == lines
    assert not (copied["save"] / "iter_0000004").exists()


def refused(argv: list[str], name: str) -> int:
    """Run the script, which is to name a file in the one line that it ends with -> exit code."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = pretrain(argv)
    last = stderr.getvalue().splitlines()[-1]
    assert "error: " in last and name in last and "is not what was written" in last, stderr.getvalue()
    return code


def test_a_flipped_bit_in_an_old_checkpoint_ends_every_rank(copied) -> None:
    checkpoint = copied["save"] / "iter_0000002"
    without_digests(checkpoint)
    name = holding(checkpoint, weights=False)
    flip(checkpoint / name, random.Random(1))
    assert run_ranks(refused, 2, arguments(copied, "--train-iters 4"), name) == [2, 2]


def test_weights_load_from_a_checkpoint_whose_optimizer_is_damaged(copied) -> None:
    """Nobody looks at what nobody needs."""
    checkpoint = copied["save"] / "iter_0000002"
    flip(checkpoint / holding(checkpoint, weights=False), random.Random(2))
    places = {**copied, "megatron": copied["save"], "save": copied["save"].parent / "next"}
    for path in copied["data"].glob("reference.*"):  # that of another policy
        path.unlink()
    assert run_ranks(pretrain, 2, arguments(places, "--train-iters 1")) == [0, 0]


def find(argv: list[str]) -> tuple[str, int]:
    """Find what a run would go on from -> (it, bytes that this rank hashed for that)."""
    from megatron_sppo import config as configuration
    from megatron_sppo.training import inputs
    from megatron_sppo.training.config import TrainingConfig

    config = configuration.parse(TrainingConfig, name="test", description="", argv=argv)
    with counted() as counts:
        resumed = inputs.find_resumable(config)
        source, _, _ = inputs.open_source(config, resumed)
    assert resumed == source
    return str(source), counts.hashed


def test_one_rank_looks_for_the_newest_sound_checkpoint_and_tells_the_others(copied) -> None:
    (copied["save"] / "latest_checkpointed_iteration.txt").write_text("garbage")
    shutil.copytree(copied["save"] / "iter_0000002", copied["save"] / "iter_0000003")
    damaged = copied["save"] / "iter_0000003"
    flip(damaged / holding(damaged, weights=False), random.Random(3))
    found = run_ranks(find, 4, arguments(copied, ""))
    assert {path for path, _ in found} == {str(copied["save"] / "iter_0000002")}
    assert found[0][1] > 10_000_000 and [hashed for _, hashed in found[1:]] == [0, 0, 0]


def test_a_resumed_run_does_not_open_the_checkpoint_that_it_started_from(copied) -> None:
    assert run_ranks(pretrain, 2, arguments({**copied, "megatron": Path("/nowhere")}, "--train-iters 4")) == [0, 0]


def test_export_and_verify_read_weights_alone_and_hash_them_once(trained, tmp_path: Path) -> None:
    checkpoint = trained["save"] / "iter_0000002"
    weights = item_bytes(checkpoint, weights=True)
    with counted() as counts:
        export_checkpoint(trained["save"], tmp_path / "out")
    assert weights <= counts.hashed <= weights + SMALL
    assert counts.read <= 1.4 * weights  # with what describes each of many small items
    with counted() as counts:  # again: what is there is compared with what is to be written
        export_checkpoint(trained["save"], tmp_path / "out")
    assert weights <= counts.hashed <= weights + SMALL and counts.read <= 2.4 * weights
    with counted() as counts:
        assert verify(tmp_path / "out", trained["save"], dtype="float32", layerwise=False)["tensors"]["different"] == []
    # Compared, and then built as a model: each checks what it reads.
    assert counts.hashed <= 2 * weights + SMALL


def test_an_import_that_is_there_is_verified_once(trained) -> None:
    target = trained["megatron"] / "iter_0000000"
    size = sum(path.stat().st_size for path in target.glob("*.distcp"))
    with counted() as counts:
        import_checkpoint(trained["hf"], trained["megatron"])
    assert size <= counts.hashed <= size + SMALL
    assert counts.read <= 2 * size + SMALL  # compared with the Hugging Face side, and checked as it is read


def test_the_items_of_a_saved_checkpoint_are_all_listed(trained) -> None:
    checkpoint = trained["save"] / "iter_0000002"
    items: Any = Items(checkpoint)
    metadata = read_metadata(checkpoint)
    assert items.without_digests({info.relative_path for info in metadata.storage_data.values()}) == []
