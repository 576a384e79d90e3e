"""What the judging tools say and do when there is little or nothing to learn from the verdicts, and when a row or a
file is at fault: exit codes, the last line, what is on disk. Verdicts are made up by a server on the loopback.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.judge.diagnostics import ONE_SIDED_PAIRS
from megatron_sppo.locks import locked
from megatron_sppo.report.page import write_report
from tests.commands import run_here
from tests.unit.judge.groups import group_of
from tests.unit.judge.judge_server import Server, answers_of, longer_wins, running_server
from tests.unit.judge.rollout_files import write_rollouts
from tests.unit.judge.test_reward import write_model
from tests.unit.selfplay.synthetic import write_run

TEXTS = [("a long answer", "short", "neither of both"), ("one", "other one", "yet another one"), ("x", "yy", "zzz")] * 2


Tool = Callable[..., tuple[int, str]]


def tool(script: str) -> Tool:
    def run(*arguments: object) -> tuple[int, str]:
        """Run it in this process -> (exit code, last line on stderr)."""
        done = run_here(script, *arguments)
        return done.returncode, "".join(done.stderr.splitlines()[-1:])

    return run


@pytest.fixture
def score() -> Tool:
    return tool("tools/score_pairrm.py")


@pytest.fixture
def evaluate() -> Tool:
    return tool("tools/evaluate.py")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SPPO_ENDPOINT_CACHE", "")
    with running_server() as running:
        yield running


def rollouts_of(directory: Path, texts=TEXTS, **settings: Any) -> Path:
    groups = [group_of(f"question {i}?", of_K, prompt_id=f"p{i}", **settings) for i, of_K in enumerate(texts)]
    return write_rollouts(directory, groups, rows_per_shard=4)


def saying(choice: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda body: (200, {"choices": [choice]}, {})


THINKING = {"token": "<think>", "top_logprobs": [{"token": "<think>", "logprob": -0.01}]}
ALWAYS_A = saying({"message": {"content": "A"}})
NO_VERDICTS = {
    "reasons": saying({"message": {"content": "<think>"}, "logprobs": {"content": [THINKING]}}),
    "reasons apart": saying({"message": {"content": None, "reasoning_content": "Let"}}),
    "declines": saying({"message": {"content": "I'm sorry"}}),
    "says nothing": saying({}),
}


@pytest.mark.parametrize("kind", NO_VERDICTS)
def test_verdicts_that_cannot_be_read_stop_before_anything_is_written(
    score: Tool, server: Server, tmp_path: Path, kind: str
) -> None:
    """Six prompts of three answers: 18 pairs, 36 questions."""
    server.answer = NO_VERDICTS[kind]
    arguments = ["--rollouts", rollouts_of(tmp_path / "r"), "--judge", f"endpoint:{server.url}#m"]
    code, last = score(*arguments, "--output", tmp_path / "d")
    assert code == 2 and not (tmp_path / "d").exists()
    for fact in ("18 of 18 pairs are ties", "36 of 36 verdicts are neither A nor B", "--verdict-tokens", "no-signal"):
        assert fact in last
    assert score(*arguments, "--output", tmp_path / "d", "--allow-no-signal")[0] == 0
    diagnostics = json.loads((tmp_path / "d" / "diagnostics.json").read_text())
    assert (diagnostics["unreadable_rate"], diagnostics["tie_rate"], diagnostics["leaning_answers"]) == (1.0, 1.0, 0)


def test_a_judge_that_was_mended_is_asked_anew_by_the_same_command(
    score: Tool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the scores nor the cache hold on to verdicts that could not be read."""
    monkeypatch.setenv("SPPO_ENDPOINT_CACHE", str(tmp_path / "cache"))
    arguments = ["--rollouts", rollouts_of(tmp_path / "r"), "--judge", f"endpoint:{server.url}#m"]
    server.answer = NO_VERDICTS["reasons"]
    assert score(*arguments, "--output", tmp_path / "d")[0] == 2
    server.answer = longer_wins
    assert score(*arguments, "--output", tmp_path / "d")[0] == 0
    assert PreferenceDataset(tmp_path / "d").win_rates(0).argmax() == 2, "the longest answer"


def test_scores_that_were_read_are_kept_for_allow_no_signal(score: Tool, server: Server, tmp_path: Path) -> None:
    server.answer = ALWAYS_A
    arguments = ["--rollouts", rollouts_of(tmp_path / "r"), "--judge", f"endpoint:{server.url}#m"]
    assert score(*arguments, "--output", tmp_path / "d")[0] == 2
    asked = len(server.bodies)
    assert score(*arguments, "--output", tmp_path / "d", "--allow-no-signal")[0] == 0
    assert len(server.bodies) == asked


def test_a_judge_that_always_says_a_stops_in_both_orders_and_in_one(
    score: Tool, server: Server, tmp_path: Path
) -> None:
    server.answer = ALWAYS_A
    arguments = ["--rollouts", rollouts_of(tmp_path / "r"), "--judge", f"endpoint:{server.url}#m"]
    code, last = score(*arguments, "--output", tmp_path / "d")
    assert code == 2 and "in 18 of 18 the same place wins in both orders" in last
    code, last = score(*arguments, "--output", tmp_path / "d", "--one-order")
    assert code == 2 and "the answer shown first wins all 18 pairs" in last and "leave --one-order out" in last
    assert ONE_SIDED_PAIRS <= 18 and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("texts", "facts"),
    [
        ([("a",), ("b",)], ["each prompt has one answer", "--num-responses 5"]),
        ([("a", "a"), ("b", "b")], ["2 of 2 pairs are ties", "2 of identical texts", "--temperature"]),
        # rules:concise scores answers without words alike.
        ([("!", "?"), (".", ",")], ["2 of 2 pairs are ties", "tells these answers apart"]),
    ],
)
def test_rollouts_that_no_judge_can_tell_apart_stop(score: Tool, tmp_path: Path, texts, facts: list[str]) -> None:
    rollouts = rollouts_of(tmp_path / "r", texts)
    code, last = score("--rollouts", rollouts, "--judge", "rules:concise", "--output", tmp_path / "d")
    assert code == 2 and all(fact in last for fact in facts) and not (tmp_path / "d").exists()


def test_a_circle_has_no_signal_although_no_pair_is_tied(score: Tool, tmp_path: Path) -> None:
    """Rock, paper, scissors: each answer wins once and loses once, so that every target is 0."""
    rollouts = rollouts_of(tmp_path / "r", [("x" * 20, "x" * 40, "x" * 60)])
    code, last = score("--rollouts", rollouts, "--judge", "rules:cyclic", "--output", tmp_path / "d")
    assert code == 2 and "0 of 3 pairs are ties, and every answer's win rate is one half" in last


def test_a_rebuilt_dataset_without_signal_is_refused_as_well(score: Tool, server: Server, tmp_path: Path) -> None:
    server.answer = ALWAYS_A
    arguments = ["--rollouts", rollouts_of(tmp_path / "r"), "--judge", f"endpoint:{server.url}#m", "--allow-no-signal"]
    assert score(*arguments, "--output", tmp_path / "d")[0] == 0
    code, last = score("--from-dataset", tmp_path / "d", "--output", tmp_path / "e", "--preset", "official")
    assert code == 2 and "18 of 18 pairs are ties" in last and not (tmp_path / "e").exists()


def some_unreadable(body: dict[str, Any]) -> Any:
    return NO_VERDICTS["declines"](body) if "short" in answers_of(body) else longer_wins(body)


def test_shares_are_warned_of_and_stand_in_the_diagnostics_and_in_the_report(
    score: Tool, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of six prompts have the answer "short", in 4 of their 6 questions each: 8 of 36 cannot be read."""
    server.answer = some_unreadable
    rollouts = rollouts_of(tmp_path / "r", finish_reason="length")
    with caplog.at_level(logging.WARNING):
        arguments = ["--rollouts", rollouts, "--judge", f"endpoint:{server.url}#m", "--output", tmp_path / "d"]
        assert score(*arguments)[0] == 0
    diagnostics = json.loads((tmp_path / "d" / "diagnostics.json").read_text())
    assert diagnostics["unreadable_rate"] == pytest.approx(8 / 36) and diagnostics["cut_rate"] == 1.0
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert diagnostics["warnings"] == said
    unreadable = "verdicts that were neither A nor B, counted as ties"
    cut = "answers that ended at --max-tokens"
    assert any(text.startswith(f"{unreadable}: 22.2 %. Let the judge") for text in said)
    assert any(text.startswith(f"{cut}: 100.0 %. ") and "--max-tokens" in text for text in said)
    run_dir = write_run(tmp_path / "run")
    shutil.copy(tmp_path / "d" / "diagnostics.json", run_dir / "iter_1" / "dataset" / "diagnostics.json")
    page = re.sub("</?span>", "", write_report(run_dir).read_text())
    for label, value in ((unreadable, "0.2222 (!)"), (cut, "1.0000 (!)")):
        assert value in page.split(f"{label}</td>")[1].split("</tr>")[0]


def test_order_disagreement_is_the_share_of_pairs_that_the_place_decides(
    score: Tool, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A judge that says A unless "zzz" is in play: in two of six prompts two of three pairs are decided by length."""

    def answer(body: dict[str, Any]) -> Any:
        return longer_wins(body) if "zzz" in answers_of(body) else ALWAYS_A(body)

    server.answer = answer
    arguments = ["--rollouts", rollouts_of(tmp_path / "r"), "--judge", f"endpoint:{server.url}#m"]
    with caplog.at_level(logging.WARNING):
        assert score(*arguments, "--output", tmp_path / "d")[0] == 0
    diagnostics = json.loads((tmp_path / "d" / "diagnostics.json").read_text())
    assert diagnostics["order_disagreement"] == pytest.approx(14 / 18)
    assert "another answer wins when the order is turned: 77.8 %" in caplog.text


def test_a_row_that_the_server_refuses_is_set_aside_in_its_words_and_the_job_goes_on(
    score: Tool, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = "maximum context length is 300 tokens"
    long = "long " * 400
    server.answer = lambda body: (
        (400, {"error": {"message": words}}, {}) if long in body["messages"][1]["content"] else longer_wins(body)
    )
    texts = [(long, "short"), ("aaa", "b"), ("cc", "ddd")]
    arguments = ["--rollouts", rollouts_of(tmp_path / "r", texts), "--judge", f"endpoint:{server.url}#m"]
    assert score(*arguments, "--output", tmp_path / "d")[0] == 0
    dataset = PreferenceDataset(tmp_path / "d")
    assert [row["prompt_id"] for row in dataset.manifest.quarantined] == ["p0"]
    assert words in dataset.manifest.quarantined[0]["reason"] and words in caplog.text
    assert [dataset.win_rates(g).argmax() for g in range(2)] == [0, 1]
    without = ["--rollouts", rollouts_of(tmp_path / "s", texts[1:]), "--judge", f"endpoint:{server.url}#m"]
    assert score(*without, "--output", tmp_path / "e")[0] == 0
    np.testing.assert_array_equal(dataset.all_judge_logits(), PreferenceDataset(tmp_path / "e").all_judge_logits())


LOSSES: dict[str, Callable[[Path], object]] = {
    "a lost file": lambda path: (path / "win_rates.bin").unlink(),
    "a cut file": lambda path: (path / "tokens.idx").write_bytes(b""),
    "a damaged manifest": lambda path: (path / "manifest.json").write_text("{}"),
    "damaged diagnostics": lambda path: (path / "diagnostics.json").write_text("{"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_damaged_dataset_is_written_again_by_the_command_that_wrote_it(
    score: Tool, tmp_path: Path, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--rollouts", rollouts_of(tmp_path / "r"), "--judge", "rules:concise", "--output", tmp_path / "d"]
    assert score(*arguments)[0] == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    LOSSES[loss](tmp_path / "d")
    assert score(*arguments)[0] == 0
    assert "It is judged and written again." in caplog.text
    assert {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()} == whole


@pytest.mark.parametrize("names", [("notes.txt",), ("shard-00000.jsonl", "manifest.json"), ("model.safetensors", "x")])
def test_what_is_no_dataset_is_not_replaced(score: Tool, tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).write_text("precious")
    arguments = ["--rollouts", rollouts_of(tmp_path / "r"), "--judge", "rules:concise", "--output", tmp_path / "d"]
    code, last = score(*arguments)
    assert code == 2 and f"holds {names[0]}" in last and "another directory" in last
    assert all((tmp_path / "d" / name).read_text() == "precious" for name in names)


def test_judging_after_the_reasoning_is_another_dataset_and_says_whose_answers_have_no_end(
    score: Tool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [("<think>long</think>The water is blue.", "<think>never ends", "Because.")]
    arguments = [
        "--rollouts",
        rollouts_of(tmp_path / "r", texts),
        "--judge",
        "rules:concise",
        "--output",
        tmp_path / "d",
    ]
    assert score(*arguments)[0] == 0
    whole = PreferenceDataset(tmp_path / "d").all_judge_logits()
    assert score(*arguments, "--judge-after", "</think>")[0] == 0
    dataset = PreferenceDataset(tmp_path / "d")
    assert dataset.manifest.judge == "rules:concise, after </think>"
    assert not np.array_equal(dataset.all_judge_logits(), whole), "the scores of whole answers were taken"
    assert "without an end of their reasoning, judged as empty: 33.3 %" in caplog.text
    # What is trained on is the whole answer.
    assert [len(dataset.response(0, k)) for k in range(3)] == [3, 3, 3]


def evaluation(tmp_path: Path, server: Server, policy, base) -> list[object]:
    rollouts = [rollouts_of(tmp_path / name, texts) for name, texts in (("policy", policy), ("base", base))]
    judge = ["--judge", f"endpoint:{server.url}#m", "--output", tmp_path / "result.json"]
    return ["--policy", rollouts[0], "--base", rollouts[1], "--previous", rollouts[1], *judge]


@pytest.mark.parametrize("kind", [*NO_VERDICTS, "always A"])
def test_an_evaluation_without_signal_is_no_parity(evaluate: Tool, server: Server, tmp_path: Path, kind: str) -> None:
    server.answer = NO_VERDICTS.get(kind, ALWAYS_A)
    arguments = evaluation(tmp_path / "e", server, [("a", "bb"), ("e", "f")], [("cc", "d"), ("e", "g")])
    code, last = evaluate(*arguments)
    # Four pairs of the first prompt, three of the second: "e" against "e" is no pair of different answers.
    assert code == 2 and "all 7 pairs of different answers are ties" in last and "--allow-no-signal" in last
    assert ("neither A nor B" in last) == (kind != "always A") and not (tmp_path / "e" / "result.json").exists()
    assert evaluate(*arguments, "--allow-no-signal")[0] == 0
    result = json.loads((tmp_path / "e" / "result.json").read_text())
    assert result["win_rate_vs_base"]["mean"] == 0.5
    assert any(
        text.startswith("pairs of different answers at exactly one half: 100.0 %") for text in result["warnings"]
    )


def test_equal_policies_are_at_parity_and_no_fault_of_the_judge(evaluate: Tool, server: Server, tmp_path: Path) -> None:
    texts = [("a", "a"), ("b", "b")]
    assert evaluate(*evaluation(tmp_path, server, texts, texts))[0] == 0
    assert json.loads((tmp_path / "result.json").read_text())["win_rate_vs_base"]["mean"] == 0.5


def test_an_evaluation_leaves_a_refused_prompt_out(
    evaluate: Tool, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the other prompt the policy's answers are longer, and win with a bare verdict: sigmoid((2 + 2) / 2)."""
    long = "long " * 400
    server.answer = lambda body: (
        (400, {"error": {"message": "too long"}}, {}) if long in body["messages"][1]["content"] else longer_wins(body)
    )
    arguments = evaluation(tmp_path, server, [(long, "bb"), ("eee", "fff")], [("cc", "d"), ("g", "h")])
    assert evaluate(*arguments)[0] == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["win_rate_vs_base"]["num_prompts"] == 1
    assert result["win_rate_vs_base"]["mean"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert "prompt p0 is left out" in caplog.text and "too long" in caplog.text


def test_an_evaluation_by_a_broken_judge_is_no_crash(evaluate: Tool, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    save_file({n: t * float("nan") for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    policy, base = rollouts_of(tmp_path / "p"), rollouts_of(tmp_path / "b", [("q", "r", "s")] * 6)
    arguments = ["--policy", policy, "--base", base, "--previous", base, "--output", tmp_path / "r.json"]
    code, last = evaluate(*arguments, "--judge", f"reward:{directory}")
    assert code == 2 and "could judge none of 6 prompts" in last and not (tmp_path / "r.json").exists()


def test_reasoning_that_never_ends_is_named_as_the_cause(score: Tool, tmp_path: Path) -> None:
    rollouts = rollouts_of(tmp_path / "r", [("<think>a", "<think>b")] * 4)
    arguments = ["--rollouts", rollouts, "--judge", "rules:concise", "--output", tmp_path / "d"]
    code, last = score(*arguments, "--judge-after", "</think>")
    assert code == 2 and "8 of 8 answers hold nothing behind their reasoning" in last and "--max-tokens" in last


def test_a_rebuild_waits_for_who_has_the_output_and_wants_a_name(score: Tool, tmp_path: Path) -> None:
    rollouts = rollouts_of(tmp_path / "r")
    assert score("--rollouts", rollouts, "--judge", "rules:concise", "--output", tmp_path / "d")[0] == 0
    with locked(tmp_path / ".e.scores", flag="--output"):
        code, last = score("--from-dataset", tmp_path / "d", "--output", tmp_path / "e")
    assert code == 2 and "is in use by" in last and not (tmp_path / "e").exists()
    assert score("--from-dataset", tmp_path / "d", "--output", ".")[0] == 2
    (tmp_path / "d" / "diagnostics.json").write_text("[1]")
    code, last = score("--from-dataset", tmp_path / "d", "--output", tmp_path / "f")
    assert code == 2 and "diagnostics.json" in last and "holds no counts" in last


def test_an_output_that_is_a_link_is_written_where_it_leads(score: Tool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "d").symlink_to(tmp_path / "disk")
    rollouts = rollouts_of(tmp_path / "r")
    assert score("--rollouts", rollouts, "--judge", "rules:concise", "--output", tmp_path / "d")[0] == 0
    assert (tmp_path / "d").is_symlink() and (tmp_path / "disk" / "manifest.json").is_file()
