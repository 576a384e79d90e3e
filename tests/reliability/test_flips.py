"""Proves: of a file with one flipped bit, cut short or exchanged, nothing is taken that was not written.

For every kind of file that the project reads: the reader says so in words that name it, or gives what the whole file
gives to the bit (some bits carry nothing: white space, a date in a zip archive). A job that makes damaged parts again,
such as sampling and scoring, must end with the same files. What has no checksum of anybody's cannot be proven: a
downloaded model outside of the hub's cache, a file of prompts, logs (metrics.jsonl).

Expected results are those of the whole files, from before the damage. The damage is made of the case's number alone.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sppo.checkpoints.file_digests import check_blobs, sha256_of_files
from megatron_sppo.checkpoints.megatron_checkpoint import TRACKER_FILE, resolve_checkpoint
from megatron_sppo.checkpoints.model_files import read_model_files
from megatron_sppo.checkpoints.peft_files import open_peft_adapter
from megatron_sppo.conversion.adapters import export_adapter, import_adapter
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.reference_file import Pieces, read_reference, write_reference
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.json_files import read_json, sealed, write_json
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.matrices import MatricesJudge
from megatron_sppo.judge.shard_scores import score_rollouts
from megatron_sppo.judge.workers import pooled_here
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.rollout.generate import generate_rollouts
from megatron_sppo.rollout.records import RolloutGroup, read_manifest, read_rollouts
from megatron_sppo.selfplay.stages import read_state
from megatron_sppo.selfplay.summary import read_summary
from tests.adapters import random_adapter
from tests.models import tiny_llama
from tests.reliability.tally import Tally
from tests.unit.data import make
from tests.unit.judge.rollout_files import random_rollouts
from tests.unit.rollout.fake_sampler import FakeSampler, fake_factory

REFUSALS = (DataError, ConversionError, ConfigError)
FINGERPRINT = {"model": "m", "precision": "bf16"}


@dataclass(frozen=True)
class Kind:
    """One artefact: how it is made, what reads it, and which of its files are damaged."""

    make: Callable[[Path, Path], Any]
    """(place to fill, a directory with a sound model `hf` and its adapter `adapter`)."""
    read: Callable[[Path, Path], Any]
    """(place, scratch directory) -> all that a reader takes from it, in what can be compared."""
    files: str = "**/*"
    names_place: bool = False
    """The message may name the artefact in place of the file: two of its files contradict each other."""


def tree(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def exported(place: Path, scratch: Path) -> Any:
    export_checkpoint(place / "megatron", scratch / "out")
    return tree(scratch / "out")


def adapters_exported(place: Path, scratch: Path) -> Any:
    export_adapter(place / "megatron", scratch / "out", base=None)
    return tree(scratch / "out")


def make_adapter_checkpoint(place: Path, sound: Path) -> None:
    import_adapter(sound / "adapter", place / "megatron", base=sound / "hf", dtype="float32")


def make_new_adapter(place: Path, sound: Path) -> None:
    """As training's: with no words of an imported file to keep."""
    import_adapter(sound / "adapter", place / "megatron", base=sound / "hf", dtype="bfloat16")
    export_adapter(place / "megatron", place / "adapter", base=sound / "hf")
    shutil.rmtree(place / "megatron")


def adapter(place: Path, _: Path) -> Any:
    opened = open_peft_adapter(place / "adapter")
    read = {name: [m.float().numpy().tobytes() for m in opened.read(name)] for name in opened.factors}
    return opened.rank, opened.alpha, opened.use_rslora, opened.target_modules, opened.base_hash, read


def dataset(place: Path, _: Path) -> Any:
    opened = PreferenceDataset(place)
    arrays = (opened.all_tokens(), opened.all_win_rates(), opened.all_preferences(), opened.all_judge_logits())
    settings = {name: value for name, value in vars(opened.manifest).items() if name != "files"}
    return [a.tobytes() for a in arrays], opened.lengths.tolist(), list(opened.raw_lines()), settings


def make_reference(place: Path, _: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_reference(place, values, FINGERPRINT)
    pieces = Pieces(place, FINGERPRINT, shape=(4, 3))
    pieces.write(np.arange(5), values.reshape(-1)[:5])
    pieces.write(np.arange(5, 9), values.reshape(-1)[5:9])


def reference(place: Path, _: Path) -> Any:
    values, pieces = read_reference(place, FINGERPRINT), Pieces(place, FINGERPRINT, shape=(4, 3)).read()
    return [None if v is None else v.tobytes() for v in (values, pieces)]


def rollouts(place: Path, _: Path) -> Any:
    return read_manifest(place), list(read_rollouts(place))


def config_of(place: Path) -> GenerateConfig:
    return GenerateConfig(
        model=place.parent / "hf", prompts=place / "prompts.jsonl", output=place / "rollouts",
        num_responses=2, max_tokens=6, shard_size=2,
    )  # fmt: skip


def sample(place: Path, _: Path) -> Any:
    """Go on with a job, by the same command -> its shards and manifest."""
    generate_rollouts(config_of(place), make_sampler=fake_factory(FakeSampler()))
    manifest, groups = rollouts(place / "rollouts", place)
    return dataclasses.replace(manifest, model=""), groups  # which is another copy's


def make_sampled(place: Path, sound: Path) -> None:
    shutil.copytree(sound / "hf", place.parent / "hf", dirs_exist_ok=True)
    rows = [json.dumps({"prompt_id": f"p{n}", "prompt": f"What is {n}?"}) for n in range(5)]
    (place / "prompts.jsonl").write_text("\n".join(rows))
    sample(place, place)


def make_half_sampled(place: Path, sound: Path) -> None:
    """A job that was killed before its last shard."""
    make_sampled(place, sound)
    content = read_json(place / "rollouts/request.json")
    entries = {index: content["shards"].pop(index) for index in ("1", "2")}
    write_json(place / "rollouts/request.json", content, seal=True)
    line = sealed({"index": 1, **entries["1"]})
    (place / "rollouts/finished.jsonl").write_text(json.dumps(line) + "\n")
    for name in ("shard-00002.jsonl", "manifest.json"):
        (place / "rollouts" / name).unlink()


def score(place: Path, _: Path) -> Any:
    """Go on with scoring -> what it takes over, and makes again, for the dataset."""
    score_rollouts(place / "r", pooled_here(load_judge("rules:cyclic")), place / "work", rule="paper")
    return list(_blocks(place))


def _blocks(place: Path) -> Iterator[Any]:
    from megatron_sppo.judge.shard_files import ShardKey, read_blocks, scores_path

    manifest = read_manifest(place / "r")
    for number in range(len(manifest.shards)):
        key = ShardKey.of(manifest, number, load_judge("rules:cyclic"), rule="paper")
        for block in read_blocks(scores_path(place / "work", number), key):
            groups = [getattr(v, "tolist", lambda v=v: v)() for v in vars(block.groups).values()]
            yield block.rows, block.num_cut.tolist(), groups


def make_scored(place: Path, sound: Path) -> None:
    random_rollouts(place / "r", num_prompts=2, num_responses=3, rows_per_shard=1)
    score(place, place)


def make_matrices(place: Path, _: Path) -> None:
    rows = [{"prompt_id": f"p{n}", "preferences": [[0.5, 0.25 + n / 8], [0.75 - n / 8, 0.5]]} for n in range(3)]
    (place / "matrices.jsonl").write_text("".join(json.dumps(sealed(row)) + "\n" for row in rows))


def matrices(place: Path, _: Path) -> Any:
    judge = MatricesJudge(str(place / "matrices.jsonl"), rule="paper")
    answers = [{"text": text, "token_ids": [1], "finish_reason": "stop", "seed": None} for text in "ab"]
    import msgspec

    groups = [
        msgspec.convert(
            {"prompt_id": f"p{n}", "messages": [{"role": "user", "content": "?"}], "prompt_token_ids": [1],
             "responses": answers},
            RolloutGroup,
        )
        for n in range(3)
    ]  # fmt: skip
    return [np.asarray(verdict).tolist() for verdict in judge.judge_logits(groups)]


def make_snapshot(place: Path, sound: Path) -> None:
    """A model as the hub's cache has it: large files under their sha256, small ones under git's hash of them."""
    blobs = place / "models--a--b/blobs"
    snapshot = place / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (sound / "hf").iterdir():
        content = path.read_bytes()
        is_large = path.suffix == ".safetensors"
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        name = hashlib.sha256(content).hexdigest() if is_large else git
        (blobs / name).write_bytes(content)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")


def snapshot_read(place: Path, scratch: Path) -> Any:
    snapshot = place / "models--a--b/snapshots/0123"
    import_checkpoint(snapshot, scratch / "megatron")
    return tree(scratch / "megatron")


def make_run_files(place: Path, _: Path) -> None:
    rate = {"mean": 0.5, "low": 0.4, "high": 0.6, "num_prompts": 3}
    entry = {"iteration": 1, "judge": "rules:concise", "win_rate_vs_base": rate, "win_rate_vs_previous": rate}
    entry |= {"mean_response_tokens": 12.5, "seconds": {"train": 3.0}}
    stage = {"status": "done", "command": ["a"], "inputs_sha256": "0", "inputs": {}, "outputs": {}, "seconds": 1.5}
    state = {"schema_version": 1, "finished": True, "stages": {"iter_1-train": stage}, "iterations_done": 1}
    contents = {"summary.json": {"iterations": [entry]}, "state.json": state, "result.json": {"prompts": [entry]}}
    for name in ("tournament.json", "diagnostics.json", "trackers.json", "file_digests.json"):
        contents[name] = {"tournament_version": 1, "of": name, "numbers": [0.1, 2, 3e-5]}
    for name, content in contents.items():
        write_json(place / name, content, seal=True)


def run_files(place: Path, _: Path) -> Any:
    read = {path.name: read_json(path) for path in sorted(place.glob("*.json"))}
    known = {"iterations", "schema_version", "finished", "stages", "iterations_done", "prompts", "tournament_version"}
    read = {
        name: {k: v for k, v in content.items() if k in {*known, "of", "numbers"}} for name, content in read.items()
    }
    return read, read_summary(place)["iterations"], (read_state(place) or {})["stages"]


KINDS: dict[str, Kind] = {
    "Megatron checkpoint": Kind(
        lambda place, sound: import_checkpoint(sound / "hf", place / "megatron"), exported, names_place=True
    ),
    "Megatron checkpoint of adapters": Kind(make_adapter_checkpoint, adapters_exported, names_place=True),
    "PEFT adapter": Kind(make_new_adapter, adapter, names_place=True),
    "dataset": Kind(lambda place, _: make.write(place / "d", make.groups()), lambda p, s: dataset(p / "d", s)),
    "reference": Kind(make_reference, reference),
    "rollouts": Kind(
        lambda place, _: random_rollouts(place / "r", num_prompts=4, num_responses=3, rows_per_shard=2),
        lambda place, scratch: rollouts(place / "r", scratch),
    ),
    "finished sampling": Kind(make_sampled, sample, files="rollouts/*"),
    "unfinished sampling": Kind(make_half_sampled, sample, files="rollouts/*"),
    "score shards": Kind(make_scored, score, files="work/*.npz"),
    "matrices": Kind(make_matrices, matrices),
    "model in the hub's cache": Kind(make_snapshot, snapshot_read, files="**/blobs/*", names_place=True),
    "files of a run": Kind(make_run_files, run_files),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    tiny_llama(root / "hf", num_hidden_layers=1)
    random_adapter(root / "adapter", root / "hf")
    return root


@pytest.fixture(scope="module")
def made(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Make an artefact once, and read it whole -> (its place, what was read)."""

    @functools.cache
    def of(kind: str) -> tuple[Path, Any]:
        place = tmp_path_factory.mktemp("made") / "artefact"
        place.mkdir()
        KINDS[kind].make(place, sound)
        copy = tmp_path_factory.mktemp("whole")
        return place, KINDS[kind].read(_copied(place, copy), copy / "scratch")

    return of


def _copied(place: Path, to: Path) -> Path:
    shutil.copytree(place.parent, to / "x", symlinks=True)
    (to / "scratch").mkdir()
    return to / "x" / place.name


def damage(path: Path, siblings: list[Path], rng: random.Random) -> str:
    """Flip one bit; now and then cut the file, or put another one of its size in its place -> what was done."""
    content = bytearray(path.read_bytes())
    equal = [p for p in siblings if p.stat().st_size == len(content) and p.read_bytes() != content]
    chosen = rng.random()
    if chosen < 0.05 and equal:
        other = rng.choice(equal)
        content = bytearray(other.read_bytes())
        done = f"exchanged for {other.name}"
    elif chosen < 0.15 and content:
        content = content[: rng.randrange(len(content))]
        done = f"cut to {len(content)} bytes"
    else:
        position, bit = rng.randrange(len(content)), rng.randrange(8)
        content[position] ^= 1 << bit
        done = f"bit {bit} of byte {position} flipped"
    path.write_bytes(content)
    return done


def test_damage_is_found_and_named_or_changes_nothing(
    tally: Tally,
    made: Callable[[str], tuple[Path, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.ERROR)
    kinds = list(KINDS)
    faults = []
    for number in tally.cases("flips", 60, 660):
        rng, name = random.Random(number), kinds[number % len(kinds)]
        kind, (place, truth) = KINDS[name], made(name)
        work = tmp_path / str(number)
        copy = _copied(place, work)
        files = sorted(path for path in copy.glob(kind.files) if path.is_file() and not path.is_symlink())
        path = rng.choice(files)
        done = damage(path, files, rng)
        where = f"{number}, {name}, {path.relative_to(copy)}: {done}"
        try:
            with tally.case("flips", where):
                try:
                    found = kind.read(copy, work / "scratch")
                except REFUSALS as error:
                    assert "\n" not in str(error), f"{where}: {error}"
                    is_named = path.name in str(error) or (kind.names_place and str(copy) in str(error))
                    assert is_named, f"{where}: not named by {error}"
                else:
                    assert found == truth, f"{where}: taken for what was written"
        except Exception as error:  # noqa: BLE001 (every case is tried, and all faults are told together)
            faults.append(f"{where}: {type(error).__name__}: {error}"[:500])
        shutil.rmtree(work)
    assert not faults, "\n".join(faults)


TRACKERS = ("", " ", "\n", "\0", "garbage", "7", "0000007", "-1", "1e0", "\u0661", "latest", "release", "1 0", "../1",
            "99999999999999999999", "iter_0000001", "NaN", "0x1", "1\x002", "\xff")  # fmt: skip


@pytest.mark.parametrize("text", TRACKERS)
@pytest.mark.counts("trackers")
def test_of_a_tracker_that_names_nothing_the_newest_whole_checkpoint_is_taken_and_said(
    text: str, made: Callable[[str], tuple[Path, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three iterations: the newest is damaged, so that the one before it is what is left."""
    place, _ = made("Megatron checkpoint")
    root = tmp_path / "root"
    shutil.copytree(place / "megatron", root)
    for number in (1, 2):
        shutil.copytree(root / "iter_0000000", root / f"iter_000000{number}")
    data = root / "iter_0000002" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    (root / TRACKER_FILE).write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="megatron_sppo"):
        assert resolve_checkpoint(root) == root / "iter_0000001"
    assert "taking iter_0000001" in caplog.text and "iter_0000002" in caplog.text


def test_a_tracker_behind_is_followed_and_said(
    made: Callable[[str], tuple[Path, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    shutil.copytree(made("Megatron checkpoint")[0] / "megatron", root)
    shutil.copytree(root / "iter_0000000", root / "iter_0000003")
    with caplog.at_level(logging.WARNING, logger="megatron_sppo"):
        assert resolve_checkpoint(root) == root / "iter_0000000"
    assert "not iter_0000003" in caplog.text


def test_a_blob_of_the_hub_that_is_not_what_its_name_says_is_refused_wherever_it_is_hashed(
    made: Callable[[str], tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = _copied(made("model in the hub's cache")[0], tmp_path / "work")
    snapshot = copy / "models--a--b/snapshots/0123"
    read_model_files(snapshot)
    for name in ("model.safetensors", "config.json"):
        blob = (snapshot / name).resolve()
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for reader in (sha256_of_files, check_blobs):
            with pytest.raises(DataError, match=f"{name} is not what the hub has.*rm {blob}"):
                reader([snapshot / name])
        blob.write_bytes(whole)
