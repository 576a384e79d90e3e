"""Rollouts to a dataset: any order of shards, any kill, any bad row; the result is one and the same directory.

Kills are SIGKILL of a forked process. The command line is tests/e2e's to prove, and so are workers on a Ray cluster.
"""

import errno
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.writer import DatasetWriter
from megatron_sppo.errors import DataError
from megatron_sppo.judge import shard_scores
from megatron_sppo.judge.diagnostics import describe_judge
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.protocol import Judge
from megatron_sppo.judge.score import merge_scores
from megatron_sppo.judge.shard_files import ShardKey, read_scores, scores_path
from megatron_sppo.judge.shard_scores import Shards, score_rollouts
from megatron_sppo.judge.workers import pooled_here
from megatron_sppo.rollout.records import RolloutGroup, read_manifest, read_rollouts
from tests.unit.judge.groups import group_of, random_group
from tests.unit.judge.naive_dataset import dataset_files
from tests.unit.judge.rollout_files import (
    encoded,
    random_rollouts,
    raw_response,
    raw_row,
    write_raw_rollouts,
    write_rollouts,
)
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm

NUM_SHARDS = 6


class DyingJudge:
    """rules:cyclic, until its process is killed while it judges shard number `last_shard`."""

    def __init__(self, last_shard: int) -> None:
        self._judge = load_judge("rules:cyclic")
        self.name, self.fingerprint, self.counts = self._judge.name, self._judge.fingerprint, self._judge.counts
        self._left = last_shard

    def judge_logits(self, groups):
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1
        return self._judge.judge_logits(groups)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rollouts") / "r"
    return random_rollouts(directory, num_prompts=NUM_SHARDS * 2, num_responses=4, rows_per_shard=2)


def score(rollouts: Path, work_dir: Path, judge: str | Judge = "rules:cyclic", rule: str = "paper") -> int:
    """Judge in this process -> pairs judged now."""
    judge = load_judge(judge) if isinstance(judge, str) else judge
    return score_rollouts(rollouts, pooled_here(judge), work_dir, rule=rule)


def die_at(rollouts: Path, work_dir: Path, last_shard: int) -> None:
    """Judge in a forked process that is killed at its shard number `last_shard`."""

    def main() -> None:
        tqdm.set_lock(threading.RLock())  # the one that fork shares may be held by a process that was killed
        score(rollouts, work_dir, DyingJudge(last_shard))

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def merge(
    rollouts: Path, work_dir: Path, output: Path, spec: str = "rules:cyclic", rule: str = "paper"
) -> dict[str, bytes]:
    """Write the dataset -> the bytes of all of its files."""
    manifest = read_manifest(rollouts)
    writer = DatasetWriter(
        output, num_responses=manifest.num_responses, tokenizer_hash=manifest.tokenizer_hash,
        vocab_size=manifest.vocab_size, judge=spec, preset=rule, selection="all", rollouts_sha256=None,
    )  # fmt: skip
    with writer:
        merge_scores(rollouts, manifest, load_judge(spec), work_dir, writer, rule=rule)
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def key(rollouts: Path, number: int, spec: str = "rules:cyclic", rule: str = "paper") -> ShardKey:
    return ShardKey.of(read_manifest(rollouts), number, load_judge(spec), rule=rule)


def naive(rollouts: Path, groups: Sequence[RolloutGroup], rule: str = "paper", **changes: Any) -> dict[str, bytes]:
    """What any way of scoring must write."""
    manifest, judge = read_manifest(rollouts), load_judge("rules:cyclic")
    fields = {"tokenizer_hash": manifest.tokenizer_hash, "vocab_size": manifest.vocab_size, "rollouts_sha256": None}
    fields |= {"judge": "rules:cyclic", "selection": "all"}
    return dataset_files(groups, lambda group: judge.judge_logits([group])[0], rule=rule, fields=fields, **changes)


@pytest.fixture(scope="module")
def undisturbed(rollouts: Path) -> dict[str, bytes]:
    return naive(rollouts, list(read_rollouts(rollouts)))


def test_the_dataset_holds_the_rollouts_and_the_judges_logits(rollouts: Path, undisturbed, tmp_path: Path) -> None:
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)
    dataset = PreferenceDataset(tmp_path)
    groups = list(read_rollouts(rollouts))
    assert dataset.num_groups == len(groups)
    for number, (group, logits) in enumerate(zip(groups, load_judge("rules:cyclic").judge_logits(groups), strict=True)):
        np.testing.assert_array_equal(dataset.judge_logits(number), logits)
        assert dataset.prompt(number).tolist() == list(group.prompt_token_ids)
        assert [dataset.response(number, k).tolist() for k in range(4)] == [list(r.token_ids) for r in group.responses]
        assert dataset.lines_of([number])[number]["prompt_id"] == group.prompt_id


@pytest.mark.parametrize("seed", range(3))
def test_judged_in_another_process_without_the_files_and_in_any_order_the_bytes_are_the_same(
    rollouts: Path, undisturbed, tmp_path: Path, seed: int
) -> None:
    """A task that was sent holds the shard: what a worker needs of the driver's disk is in it."""
    copy = shutil.copytree(rollouts, tmp_path / "rollouts")
    shards = Shards(copy, read_manifest(copy), load_judge("rules:cyclic"), tmp_path / "work", rule="paper")
    sent = [(task, pickle.dumps(task)) for task in shards.tasks()]
    shutil.rmtree(copy)
    random.Random(seed).shuffle(sent)
    for task, content in sent:
        judged = pickle.loads(content).judged(load_judge("rules:cyclic"), lambda units, amount: None)
        shards.write(task, pickle.loads(pickle.dumps(judged)))
    assert merge(rollouts, tmp_path / "work", tmp_path / "dataset") == undisturbed


@pytest.mark.parametrize("last_shard", range(NUM_SHARDS))
def test_a_killed_run_resumes_to_the_same_bytes(rollouts: Path, undisturbed, tmp_path: Path, last_shard: int) -> None:
    work_dir = tmp_path / "work"
    die_at(rollouts, work_dir, last_shard)
    assert sum(scores_path(work_dir, number).exists() for number in range(NUM_SHARDS)) == last_shard
    judge = load_judge("rules:cyclic")
    assert score(rollouts, work_dir, judge) == judge.counts["pairs"] == (NUM_SHARDS - last_shard) * 2 * 4 * 3
    assert merge(rollouts, work_dir, tmp_path / "dataset") == undisturbed


def test_what_a_worker_sends_back_is_checked_before_it_is_written(rollouts: Path, tmp_path: Path) -> None:
    shards = Shards(rollouts, read_manifest(rollouts), load_judge("rules:cyclic"), tmp_path / "work", rule="paper")
    first, second = itertools.islice(shards.tasks(), 2)
    judged = second.judged(load_judge("rules:cyclic"), lambda units, amount: None)
    with pytest.raises(AssertionError, match=first.key.entry.file):
        shards.write(first, judged)
    assert not (tmp_path / "work").exists()


def test_a_large_score_file_waits_on_the_disk(rollouts: Path, tmp_path: Path, monkeypatch, undisturbed) -> None:
    monkeypatch.setattr(shard_scores, "_MOST_HELD_BYTES", 100)
    score(rollouts, tmp_path / "work")
    assert merge(rollouts, tmp_path / "work", tmp_path / "dataset") == undisturbed


def test_the_merge_reads_no_rollouts(rollouts: Path, undisturbed, tmp_path: Path) -> None:
    """A shard is parsed once, by who judges it: they are gone when the dataset is written."""
    copy = shutil.copytree(rollouts, tmp_path / "rollouts")
    score(copy, tmp_path / "work")
    for shard in copy.glob("shard-*"):
        shard.unlink()
    assert merge(copy, tmp_path / "work", tmp_path / "dataset") == undisturbed


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_directory_is_listed_as_often_for_twenty_shards_as_for_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_resumed: bool
) -> None:
    listings: dict[int, Counter[str]] = {}
    for num_shards in (2, 20):
        place = tmp_path / str(num_shards)  # where this process has listed nothing yet
        rollouts = random_rollouts(place / "rollouts", num_prompts=num_shards, num_responses=2, rows_per_shard=1)
        work = place / "work"
        if is_resumed:
            score(rollouts, work)
        counted = listings[num_shards] = Counter()
        with monkeypatch.context() as patch:
            for name in ("listdir", "scandir"):
                patch.setattr(os, name, functools.partial(_counted, counted, name, getattr(os, name)))
            score(rollouts, work)
    assert listings[2] == listings[20] and sum(listings[20].values()) <= 3


def _counted(calls: Counter[str], name: str, function: Callable[..., Any], *args: Any) -> Any:
    calls[name] += 1
    return function(*args)


def test_the_largest_shard_is_judged_first(tmp_path: Path) -> None:
    groups = [group_of("why?", ["a", "b" * size], prompt_id=str(size)) for size in (10, 900, 400)]
    rollouts = write_rollouts(tmp_path / "r", groups, rows_per_shard=1)
    shards = Shards(rollouts, read_manifest(rollouts), load_judge("rules:concise"), tmp_path / "work", rule="paper")
    assert [task.index for task in shards.tasks()] == shards.largest_first == [1, 2, 0]


def test_scores_of_another_judge_are_not_taken(rollouts: Path, tmp_path: Path) -> None:
    score(rollouts, tmp_path)
    assert score(rollouts, tmp_path, "rules:cyclic") == 0
    assert score(rollouts, tmp_path, "rules:concise") == NUM_SHARDS * 2 * 12


@pytest.mark.parametrize(
    ("damage", "num_asked"), [("empty", 24), ("cut", 24), ("garbage", 24), ("judge_logits.npy", 24), ("block-00000", 0)]
)
def test_a_damaged_score_file_is_made_again(
    rollouts: Path, undisturbed, tmp_path: Path, damage: str, num_asked: int
) -> None:
    """A flipped bit in the logits costs 2 prompts x 12 pairs; one in what is copied of the rollouts, no verdict."""
    score(rollouts, tmp_path / "work")
    path = scores_path(tmp_path / "work", 3)
    content = bytearray(path.read_bytes())
    if damage in ("empty", "cut", "garbage"):
        content = bytearray({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"x" * 99}[damage])
    else:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(damage)
        content[member.header_offset + member.file_size] ^= 1
    path.write_bytes(content)
    assert score(rollouts, tmp_path / "work", "rules:cyclic") == num_asked
    assert merge(rollouts, tmp_path / "work", tmp_path / "dataset") == undisturbed


def test_damage_after_the_scoring_stops_the_merge(rollouts: Path, tmp_path: Path) -> None:
    score(rollouts, tmp_path / "work")
    path = scores_path(tmp_path / "work", 3)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00003.jsonl.*Run the same"):
        merge(rollouts, tmp_path / "work", tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_scores_of_an_older_version_and_of_another_preset_are_kept(rollouts: Path, undisturbed, tmp_path: Path) -> None:
    """What 0.1 left of a killed scoring: logits, reasons, counts and their key, no blocks."""
    score(rollouts, tmp_path / "work")
    for number in range(NUM_SHARDS // 2):
        scores = read_scores(scores_path(tmp_path / "work", number), key(rollouts, number))
        with open(scores_path(tmp_path / "work", number), "wb") as file:
            np.savez(
                file, judge_logits=scores.judge_logits, reasons=json.dumps({}), counts=json.dumps(dict(scores.counts)),
                key=json.dumps(key(rollouts, number).of_scores),
            )  # fmt: skip
    judge = load_judge("rules:cyclic")
    for rule in ("paper", "official", "paper"):
        assert score(rollouts, tmp_path / "work", judge, rule) == 0
        expected = undisturbed if rule == "paper" else naive(rollouts, list(read_rollouts(rollouts)), rule)
        assert merge(rollouts, tmp_path / "work", tmp_path / "dataset", rule=rule) == expected
    assert not judge.counts, "the judge was asked"


def test_a_full_disk_in_the_merge_is_no_damage_of_the_scores(rollouts: Path, tmp_path: Path, monkeypatch) -> None:
    score(rollouts, tmp_path / "work", "rules:cyclic")

    def full(writer: DatasetWriter, block: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DatasetWriter, "extend", full)
    with pytest.raises(DataError, match=r"dataset could not be written: the disk is full"):
        merge(rollouts, tmp_path / "work", tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists() and not list(tmp_path.glob(".dataset.tmp-*"))


def test_vanished_scores_stop_the_merge(rollouts: Path, tmp_path: Path) -> None:
    score(rollouts, tmp_path / "work")
    scores_path(tmp_path / "work", 2).unlink()
    with pytest.raises(DataError, match=r"shard-00002.jsonl.*Run the same"):
        merge(rollouts, tmp_path / "work", tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_a_flipped_bit_in_the_rollouts_is_found(tmp_path: Path) -> None:
    directory = random_rollouts(tmp_path / "r", num_prompts=2, num_responses=2, rows_per_shard=2)
    shard = directory / "shard-00000.jsonl"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match="is damaged"):
        score(directory, tmp_path / "work", "rules:concise")


def _with_responses(*responses: object) -> dict:
    return raw_row(responses=list(responses))


GOOD = raw_response("Fine.")
BAD_ROWS = {
    "no JSON": (b"{", "not valid JSON"),
    "cut JSON": (encoded(raw_row())[:-9], "not valid JSON"),
    "not UTF-8": (b'{"prompt_id": "\xff\xfe"}', "not valid JSON"),
    "deep JSON": (b"[" * 100_000, "not valid JSON"),
    "a list": (encoded([1]), "not a JSON object"),
    "a number": (b"7", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "empty line": (b"", "not valid JSON"),
    "no messages": (encoded(raw_row(messages=[])), "messages"),
    "messages a string": (encoded(raw_row(messages="why?")), "messages"),
    "no role": (encoded(raw_row(messages=[{"content": "why?"}])), "role"),
    "strange role": (encoded(raw_row(messages=[{"role": "tool", "content": "x"}])), "role"),
    "turn a string": (encoded(raw_row(messages=["why?"])), "$.messages[0]"),
    "content a list": (encoded(raw_row(messages=[{"role": "user", "content": ["x"]}])), "$.messages[0].content"),
    "content null": (encoded(raw_row(messages=[{"role": "user", "content": None}])), "$.messages[0].content"),
    "NUL in the prompt": (encoded(raw_row(messages=[{"role": "user", "content": "a\x00"}])), "NUL"),
    "surrogate in the prompt": (encoded(raw_row(messages=[{"role": "user", "content": "\udc00"}])), "surrogate"),
    "user silent": (encoded(raw_row(messages=[{"role": "user", "content": "  "}])), "empty"),
    "assistant last": (
        encoded(raw_row(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])),
        "not the user's",
    ),
    "NUL in prompt_text": (encoded(raw_row(prompt_text="\x00")), "NUL"),
    "prompt_text a number": (encoded(raw_row(prompt_text=3)), "$.prompt_text"),
    "no prompt tokens": (encoded(raw_row(prompt_token_ids=[])), "prompt_token_ids"),
    "prompt tokens null": (encoded(raw_row(prompt_token_ids=None)), "prompt_token_ids"),
    "prompt token negative": (encoded(raw_row(prompt_token_ids=[-1])), "$.prompt_token_ids[0]"),
    "prompt token too high": (encoded(raw_row(prompt_token_ids=[1000])), "token id"),
    "prompt token a float": (encoded(raw_row(prompt_token_ids=[1.5])), "$.prompt_token_ids[0]"),
    "prompt token true": (encoded(raw_row(prompt_token_ids=[True])), "$.prompt_token_ids[0]"),
    "prompt token a string": (encoded(raw_row(prompt_token_ids=["1"])), "$.prompt_token_ids[0]"),
    "prompt token huge": (encoded(raw_row(prompt_token_ids=[10**30])), "$.prompt_token_ids[0]"),
    "no responses": (encoded(_with_responses()), "$.responses"),
    "responses null": (encoded(raw_row(responses=None)), "$.responses"),
    "responses an object": (encoded(raw_row(responses={"0": GOOD})), "$.responses"),
    "responses missing": (encoded({k: v for k, v in raw_row().items() if k != "responses"}), "field `responses`"),
    "one response": (encoded(_with_responses(GOOD)), "1 responses, expected 2"),
    "three responses": (encoded(_with_responses(GOOD, GOOD, GOOD)), "3 responses, expected 2"),
    "response a string": (encoded(_with_responses(GOOD, "text")), "$.responses[1]"),
    "response null": (encoded(_with_responses(None, GOOD)), "$.responses[0]"),
    "text null": (encoded(_with_responses(GOOD, raw_response(None))), "$.responses[1].text"),
    "text a number": (encoded(_with_responses(GOOD, raw_response(1))), "$.responses[1].text"),
    "text missing": (encoded(_with_responses(GOOD, {"token_ids": [1]})), "$.responses[1]"),
    "text empty": (encoded(_with_responses(GOOD, raw_response(""))), "empty text"),
    "text white": (encoded(_with_responses(GOOD, raw_response(" \n\t"))), "empty text"),
    "NUL": (encoded(_with_responses(GOOD, raw_response("a\x00b"))), "NUL"),
    "high surrogate": (encoded(_with_responses(raw_response("\ud83d"), GOOD)), "surrogate"),
    "low surrogate": (encoded(_with_responses(raw_response("a\udc00b"), GOOD)), "surrogate"),
    "surrogates swapped": (encoded(_with_responses(raw_response("\ude00\ud83d"), GOOD)), "surrogate"),
    "no tokens": (encoded(_with_responses(GOOD, raw_response("a", token_ids=[]))), "token_ids"),
    "tokens null": (encoded(_with_responses(GOOD, raw_response("a", token_ids=None))), "token_ids"),
    "tokens a string": (encoded(_with_responses(GOOD, raw_response("a", token_ids="12"))), "token_ids"),
    "tokens nested": (encoded(_with_responses(GOOD, raw_response("a", token_ids=[[1]]))), "[1].token_ids[0]"),
    "token negative": (encoded(_with_responses(GOOD, raw_response("a", token_ids=[-2]))), "[1].token_ids[0]"),
    "token too high": (encoded(_with_responses(GOOD, raw_response("a", token_ids=[4, 1000]))), "token id"),
    "token null": (encoded(_with_responses(GOOD, raw_response("a", token_ids=[None]))), "[1].token_ids[0]"),
    "token infinite": (b'{"x": 1, ' + encoded(raw_row(prompt_token_ids=[float("inf")]))[1:], "$.prompt_token_ids[0]"),
    "prompt_id a list": (encoded(raw_row(["x"], responses=[])), "$.prompt_id"),
    "prompt_id a surrogate": (encoded(raw_row("\ud800", responses=[])), "$.responses"),
    "messages an object": (encoded(raw_row(messages={"role": "user", "content": "x"})), "messages"),
    "role null": (encoded(raw_row(messages=[{"role": None, "content": "x"}])), "role"),
    "content missing": (encoded(raw_row(messages=[{"role": "user"}])), "$.messages[0]"),
    "response a list": (encoded(_with_responses(GOOD, [GOOD])), "$.responses[1]"),
    "text true": (encoded(_with_responses(GOOD, raw_response(True))), "$.responses[1].text"),
    "text a list": (encoded(_with_responses(GOOD, raw_response(["a"]))), "$.responses[1].text"),
    "tokens an object": (encoded(_with_responses(GOOD, raw_response("a", token_ids={"0": 1}))), "token_ids"),
    "token beyond 64 bits": (encoded(_with_responses(GOOD, raw_response("a", token_ids=[2**70]))), "[1].token_ids[0]"),
    "token NaN": (b'{"x": 1, ' + encoded(raw_row(prompt_token_ids=[float("nan")]))[1:], "$.prompt_token_ids[0]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["rules", "pairrm"])
def test_bad_rows_are_set_aside_with_their_reason_and_nothing_else_moves(tmp_path: Path, kind: str) -> None:
    """The hash is over all files with logits, preferences and tokens: the neighbours are equal to the last bit."""
    spec = "rules:concise" if kind == "rules" else f"pairrm:{make_tiny_pairrm(tmp_path / 'pairrm')[0]}"
    good = [encoded(raw_row(f"good-{number}")) for number in range(3)]
    bad = [line for line, _ in BAD_ROWS.values()]
    mixed = write_raw_rollouts(
        tmp_path / "mixed", [[good[0], *bad[:20], good[1]], [*bad[20:], good[2]]], num_responses=2
    )
    plain = write_raw_rollouts(tmp_path / "plain", [good], num_responses=2)
    for directory in (mixed, plain):
        score(directory, tmp_path / f"work-{directory.name}", spec)
        merge(directory, tmp_path / f"work-{directory.name}", tmp_path / f"dataset-{directory.name}", spec)
    left, right = (PreferenceDataset(tmp_path / f"dataset-{name}") for name in ("mixed", "plain"))
    assert left.dataset_hash == right.dataset_hash, "a bad row changed its neighbours"
    reasons = [row["reason"] for row in left.manifest.quarantined]
    assert len(reasons) == len(BAD_ROWS) >= 60
    for (name, (_, fragment)), reason in zip(BAD_ROWS.items(), reasons, strict=True):
        assert fragment in reason and "\n" not in reason, name


def test_prompts_that_occur_twice_leave_the_bytes_of_the_others(tmp_path: Path) -> None:
    """Within a shard and across shards, at the ends and in the middle of a block; lengths differ."""
    rng = random.Random(3)
    groups = [random_group(rng, number, 3, high=9) for number in (0, 1, 0, 2, 3, 1, 4, 4, 5, 5)]
    rollouts = write_rollouts(tmp_path / "r", groups, rows_per_shard=5)
    score(rollouts, tmp_path / "work")
    first = {group.prompt_id: group for group in reversed(groups)}
    again = [groups[place].prompt_id for place in (2, 5, 7, 9)]
    reason = "the prompt_id occurs twice; the first one was kept"
    expected = naive(
        rollouts,
        [group for group in groups if group is first[group.prompt_id]],
        quarantined=[{"prompt_id": prompt_id, "reason": reason} for prompt_id in again],
    )
    assert merge(rollouts, tmp_path / "work", tmp_path / "dataset") == expected


def test_a_prompt_id_that_occurs_twice_keeps_the_first(tmp_path: Path) -> None:
    other = raw_row("a", prompt_token_ids=[9])
    rollouts = write_raw_rollouts(tmp_path / "r", [[encoded(raw_row("a"))], [encoded(other)]], num_responses=2)
    score(rollouts, tmp_path / "work", "rules:concise")
    merge(rollouts, tmp_path / "work", tmp_path / "dataset", "rules:concise")
    dataset = PreferenceDataset(tmp_path / "dataset")
    assert dataset.prompt(0).tolist() == [1, 2, 3]
    assert [row["prompt_id"] for row in dataset.manifest.quarantined] == ["a"]


def test_rollouts_without_a_single_good_row_are_refused(tmp_path: Path) -> None:
    rollouts = write_raw_rollouts(tmp_path / "r", [[b"{", b"null"]], num_responses=2)
    score(rollouts, tmp_path / "work", "rules:concise")
    with pytest.raises(DataError, match="2 were quarantined"):
        merge(rollouts, tmp_path / "work", tmp_path / "dataset", "rules:concise")
    assert not (tmp_path / "dataset").exists()


def test_diagnostics_tell_the_cyclic_judge_from_the_concise_one(rollouts: Path, tmp_path: Path) -> None:
    found = {}
    for spec in ("rules:cyclic", "rules:concise"):
        judge, work, output = load_judge(spec), tmp_path / f"{spec}-work", tmp_path / spec
        score(rollouts, work, judge)
        merge(rollouts, work, output, spec)
        found[spec] = describe_judge(PreferenceDataset(output), judge.counts)
    assert found["rules:concise"]["cycle_rate"] == 0 and found["rules:concise"]["cyclic_energy"] < 1e-9
    assert found["rules:cyclic"]["cycle_rate"] > 0.1 and found["rules:cyclic"]["cyclic_energy"] > 0.2
    assert found["rules:cyclic"]["pairs"] == NUM_SHARDS * 2 * 12
