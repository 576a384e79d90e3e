"""Proves that a comparison of players which lies in a run is part of its page, and that what is none is told."""

import json

import pytest

from megatron_sppo.commands import evaluate
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json
from megatron_sppo.report.page import write_report
from tests.unit.report.test_page import HOSTILE, Page
from tests.unit.selfplay.synthetic import write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose players and judges have names that a page must not take for markup."""
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "run")
    flags = ["--run", str(run_dir), "--judge", "rules:concise", "--more-judges", "rules:cyclic", "--allow-no-signal"]
    evaluate.main("evaluate", [*flags, "--output", str(run_dir / "tournament.json"), "--bootstrap-resamples", "50"])
    result = json.loads(json.dumps(read_json(run_dir / "tournament.json")).replace('"iter_2"', json.dumps(HOSTILE)))
    result["judges"][0]["judge"] += HOSTILE
    (run_dir / "tournament.json").write_text(json.dumps(result))
    return run_dir


def test_the_page_has_every_player_under_every_judge_and_no_markup_of_theirs(run_dir):
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    titles = [attributes.get("alt") for tag, attributes in page.tags if tag == "img"]
    assert "Every iterate against every other" in titles
    for words in ("judge rules:cyclic, unseen in training, 20 prompts", "A/A, %", "Bradley-Terry, nats", "iter_1",
                  "cyclic share of the log-odds", "self-BLEU"):  # fmt: skip
        assert words in page.text, words
    assert "<script>alert(1)</script>" in page.text  # as text
    assert not any(tag == "script" or "onerror" in attributes for tag, attributes in page.tags)


def test_the_numbers_in_the_table_are_the_result_s(run_dir):
    page = write_report(run_dir).read_text(encoding="utf-8")
    rate = json.loads((run_dir / "tournament.json").read_text())["judges"][1]["vs_baseline"][0]
    text = f"<span>{100 * rate['mean']:.1f}</span> <span>[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]</span>"
    assert text in page


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"tournament_version": 0}', '{"tournament_version": 1}', '{"win_rate_vs_base": 1}']
)
def test_what_is_no_comparison_is_told(tmp_path, content):
    run_dir = write_run(tmp_path / "run", num_iterations=1)
    (run_dir / "tournament.json").write_text(content)
    with pytest.raises(DataError, match="tournament.json"):
        write_report(run_dir)
