"""Proves: colours follow the log-ratios, best and worst are chosen by win rate, and token texts stay text."""

import html
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sppo.errors import DataError
from megatron_sppo.report.tokens import TokenAnswer, colour, full_colour, read_token_answers, token_html


def line(group: int, response: int, win_rate: float, ratios: list[float], texts: list[str | None]) -> str:
    tokens = [{"id": 7, "text": text, "log_ratio": r} for text, r in zip(texts, ratios, strict=True)]
    row = {"prompt_id": f"p{group}", "group": group, "response": response, "win_rate": win_rate, "tokens": tokens}
    return json.dumps({**row, "log_ratio": sum(ratios)}) + "\n"


def answer(texts: list[str], ratios: list[float]) -> TokenAnswer:
    return TokenAnswer(
        group=0, prompt_id="p", win_rate=0.7, log_ratio=sum(ratios), texts=tuple(texts), log_ratios=np.array(ratios)
    )


def test_best_and_worst_answer_of_each_prompt_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokens.jsonl"
    rates = {0: (0.2, 0.9, 0.5), 4: (0.6, 0.4, 0.1)}
    path.write_text("".join(line(g, k, w, [0.5], ["x"]) for g in rates for k, w in enumerate(rates[g])))
    found = [(shown.group, shown.win_rate) for shown in read_token_answers(path)]
    assert found == [(0, 0.9), (0, 0.2), (4, 0.6), (4, 0.1)]
    assert read_token_answers(tmp_path / "absent.jsonl") == ()


@pytest.mark.parametrize("damage", ["{", '{"group": 0}', '["a"]', '{"tokens": 3}'])
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tokens.jsonl"
    path.write_text(line(0, 0, 0.5, [0.0], ["x"]) + damage + "\n")
    with pytest.raises(DataError, match=r"tokens\.jsonl, line 2"):
        read_token_answers(path)


def test_colours_diverge_from_zero_and_saturate() -> None:
    assert colour(1.0, 2.0) == "rgba(37,99,168,0.38)"  # half of .75
    assert colour(-1.0, 2.0) == "rgba(204,85,34,0.38)"
    assert colour(9.0, 2.0) == colour(2.0, 2.0) == "rgba(37,99,168,0.75)"
    assert colour(0.0, 2.0).endswith(",0.00)")


def test_the_full_colour_is_the_95th_percentile() -> None:
    """|r| = 0 .. 100 in steps of 1: the 95th percentile is 95; of nothing but zeros it would be no scale."""
    assert full_colour([answer(["x"] * 101, [float((-1) ** n * n) for n in range(101)])]) == pytest.approx(95)
    assert full_colour([answer(["x"], [0.0])]) == 1.0


def test_a_token_without_text_lends_its_log_ratio_to_the_next() -> None:
    page = token_html([answer(["a", "", "b"], [0.5, 0.25, 0.25])], {"p": "Why?"}, html.escape)
    assert page.count("<span") == 2 and page.count('title="+0.5 nats"') == 2


def test_hostile_tokens_and_prompts_stay_text() -> None:
    page = token_html([answer(["<b>", '"><script>'], [0.1, -0.1])], {"p": "<i>Why?"}, html.escape)
    assert "<b>" not in page and "<script>" not in page and "<i>Why" not in page
    assert "&lt;b&gt;" in page and "&lt;i&gt;Why?" in page
    assert token_html([], {}, html.escape) == ""
