"""Stored matrices as a judge: preferences come back as they were, logits under either rule, faults in one line."""

import builtins
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sppo.data.schema import read_manifest, write_manifest
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.judge.config import ScoreConfig
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.score import rebuild, score
from megatron_sppo.objective import preference_matrix
from tests.unit.judge.groups import group_of
from tests.unit.judge.rollout_files import write_rollouts


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return f"matrices:{path}"


def test_preferences_come_back_under_the_papers_rule(tmp_path: Path) -> None:
    stored = [[0.5, 0.7, 1.0], [0.3, 0.5, 0.25], [0.0, 0.75, 0.5]]
    judge = load_judge(write(tmp_path / "m.jsonl", {"prompt_id": "p0", "preferences": stored}))
    (logits,) = judge.judge_logits([group_of("why?", ["a", "b", "c"])])
    preferences = preference_matrix(torch.from_numpy(logits), rule="paper").numpy()
    np.testing.assert_allclose(preferences, stored, atol=1e-6)
    assert preferences[0, 2] == 1.0, "certainty is kept in float32"


def test_logits_are_handed_on_and_serve_the_official_rule(tmp_path: Path) -> None:
    stored = [[0, 1.5], [-0.5, 0]]
    judge = load_judge(write(tmp_path / "m.jsonl", {"prompt_id": "p0", "judge_logits": stored}), preset="official")
    np.testing.assert_array_equal(judge.judge_logits([group_of("why?", ["a", "b"])])[0], np.float32(stored))
    assert judge.name == "matrices:m.jsonl"


def test_the_file_is_read_once_and_its_bytes_are_what_the_fingerprint_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, opened = write(tmp_path / "m.jsonl", "", {"prompt_id": "p0", "judge_logits": [[0, 1], [-1, 0]]}), []
    original = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(str(file)) or original(file, *a, **k))
    judge = load_judge(spec)
    monkeypatch.undo()
    content = {"matrices": hashlib.sha256((tmp_path / "m.jsonl").read_bytes()).hexdigest()}
    as_written = json.dumps(content, separators=(",", ":"))
    assert judge.fingerprint == hashlib.sha256(as_written.encode()).hexdigest()
    assert opened.count(str(tmp_path / "m.jsonl")) == 1


def test_preferences_are_not_put_under_a_second_rule(tmp_path: Path) -> None:
    spec = write(tmp_path / "m.jsonl", {"prompt_id": "p0", "preferences": [[0.5, 0.7], [0.3, 0.5]]})
    with pytest.raises(ConfigError, match="--preset paper"):
        load_judge(spec, preset="official")


def scored(tmp_path: Path, kind: str, stored: list[list[float]]) -> Path:
    """Score rollouts of one prompt by a matrix -> the dataset."""
    write_rollouts(tmp_path / "rollouts", [group_of("why?", ["a", "b"])], rows_per_shard=1)
    spec = write(tmp_path / "m.jsonl", {"prompt_id": "p0", kind: stored})
    score(ScoreConfig(rollouts=tmp_path / "rollouts", judge=spec, output=tmp_path / kind))
    return tmp_path / kind


def test_a_rebuild_puts_no_preferences_under_a_second_rule_either(tmp_path: Path) -> None:
    dataset = scored(tmp_path, "preferences", [[0.5, 0.9], [0.1, 0.5]])
    official = ScoreConfig(from_dataset=dataset, preset="official", output=tmp_path / "official")
    with pytest.raises(ConfigError, match="matrices:m.jsonl and not known to hold judge logits.*Leave --preset out"):
        rebuild(official, dataset)
    rebuild(ScoreConfig(from_dataset=dataset, preset="paper", selection="all", output=tmp_path / "again"), dataset)


def test_a_rebuild_puts_given_logits_under_the_official_rule_where_they_are_known_to_be_some(tmp_path: Path) -> None:
    dataset = scored(tmp_path, "judge_logits", [[0, 1.5], [-0.5, 0]])
    official = ScoreConfig(from_dataset=dataset, preset="official", output=tmp_path / "official")
    rebuild(official, dataset)
    (dataset / "diagnostics.json").unlink()  # as good as one of an earlier version, which did not count them
    with pytest.raises(ConfigError, match="not known to hold judge logits"):
        rebuild(official, dataset)


def test_a_rebuild_of_pairrm_s_logits_says_that_the_rule_alone_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = scored(tmp_path, "judge_logits", [[0, 1.5], [-0.5, 0]])
    write_manifest(dataset, dataclasses.replace(read_manifest(dataset), judge="pairrm:llm-blender/PairRM"))
    for preset, selection, words in (("official", None, 1), ("paper", "all", 0)):
        caplog.clear()
        output = tmp_path / f"as-{preset}"
        rebuild(ScoreConfig(from_dataset=dataset, preset=preset, selection=selection, output=output), dataset)
        assert caplog.text.count("the rule alone becomes that of --preset official") == words
        assert caplog.text.count("shows it each prompt's template") == words


def test_identical_responses_are_tied_and_missing_matrices_counted(tmp_path: Path) -> None:
    spec = write(tmp_path / "m.jsonl", {"prompt_id": "p0", "judge_logits": [[0, 1.5], [-0.5, 0]]})
    judge = load_judge(spec)
    same, unknown, wider = judge.judge_logits(
        [group_of("why?", ["a", "a"]), group_of("?", ["a", "b"], prompt_id="p1"), group_of("why?", ["a", "b", "c"])]
    )
    np.testing.assert_array_equal(same, np.zeros((2, 2), dtype=np.float32))
    assert "no matrix for it" in unknown.reason and "a matrix of 2 responses for it, it has 3" in wider.reason
    assert judge.counts["missing_matrices"] == 2
    assert judge.counts["identical_pairs"] == 2 and judge.counts["pairs"] == 10


def test_a_diagonal_may_hold_anything_as_it_is_not_read(tmp_path: Path) -> None:
    nulls = {"prompt_id": "p0", "judge_logits": [[None, 1.5], [-0.5, float("nan")]]}
    (matrix,) = load_judge(write(tmp_path / "m.jsonl", nulls)).judge_logits([group_of("why?", ["a", "b"])])
    np.testing.assert_array_equal(matrix, np.array([[0, 1.5], [-0.5, 0]], dtype=np.float32))


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("{", "line 2 is no matrix"),
        ("[]", "line 2 is no matrix"),
        ({"prompt_id": "p1"}, "line 2 is no matrix"),
        ({"judge_logits": [[0]]}, "prompt_id"),
        ({"prompt_id": "p1", "judge_logits": [[0, 1]]}, "K x K"),
        ({"prompt_id": "p1", "judge_logits": [[0, float("nan")], [1, 0]]}, "not finite"),
        ({"prompt_id": "p1", "judge_logits": [[0, None], [1, 0]]}, "not finite"),
        ({"prompt_id": "p1", "judge_logits": [["a"]]}, "line 2 is no matrix"),
        ({"prompt_id": "p1", "preferences": [[0.5, 0.7], [0.7, 0.5]]}, "P_ij"),
        ({"prompt_id": "p1", "preferences": [[0.5, 1.7], [-0.7, 0.5]]}, "P_ij"),
        ({"prompt_id": "p0", "judge_logits": [[0]]}, "occurs twice"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: object, fact: str) -> None:
    spec = write(tmp_path / "m.jsonl", {"prompt_id": "p0", "judge_logits": [[0]]}, line)
    with pytest.raises(DataError, match=fact) as caught:
        load_judge(spec)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        load_judge(f"matrices:{tmp_path / 'nowhere'}")


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt_id": "p", "judge_logits": [[0, 3e38], [-3e38, 0]]}, "beyond 1e"),
        ({"prompt_id": "p", "judge_logits": [[0, 10**400], [1, 0]]}, r"`\$.judge_logits\[0\]\[1\]`"),
        ({"prompt_id": "p", "judge_logits": [[0]], "preferences": [[0.5]]}, "preferences and judge_logits"),
        ({"prompt_id": "p", "matrix": [[0]]}, "neither preferences nor judge_logits"),
        ({"judge_logits": [[0]]}, "missing required field `prompt_id`"),
        ([1], "Expected `object`, got `array`"),
    ],
)
def test_a_line_that_is_no_matrix_says_why(tmp_path: Path, row: Any, reason: str) -> None:
    (tmp_path / "m.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(DataError, match=f"line 2 .*{reason}"):
        load_judge(f"matrices:{tmp_path / 'm.jsonl'}")
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no matrix"):
        load_judge(f"matrices:{tmp_path / 'm.jsonl'}")
