"""Preference data of uclaml/SPPO and TRL -> rollouts: what is kept, what is set aside, and with which token ids.

Rows are written by hand in the columns that the two projects use; the tokenizer's ids are bytes.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import unsealed
from megatron_sppo.rollout.config import TemplateConfig
from megatron_sppo.rollout.preferences import import_preferences, preference_row
from megatron_sppo.rollout.records import read_rollouts
from megatron_sppo.rollout.table_files import UnusableRow
from tests.models import byte_tokenizer

P3 = [[0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.2, 0.5]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def uclaml(**changes) -> dict:
    generated = {f"generate_{k}": [user("why?"), assistant(text)] for k, text in enumerate("abc")}
    return {"prompt": "why?", **generated, "probability": P3, "rm_scores": [2.0, 1.0, 0.0], **changes}


def trl(**changes) -> dict:
    return {"prompt": [user("why?")], "chosen": [assistant("a")], "rejected": [assistant("b")], **changes}


@pytest.mark.parametrize(
    ("row", "texts", "form", "expected"),
    [
        (uclaml(), "abc", "probability", P3),
        (uclaml(generate_0="a", generate_1="b", generate_2="c"), "abc", "probability", P3),
        (uclaml(prompt=None), "abc", "probability", P3),
        # sigmoid(s_i - s_j): sigmoid(1) and sigmoid(2)
        (
            uclaml(probability=None),
            "abc",
            "rm_scores",
            [[0.5, 1 / (1 + math.e**-1), 1 / (1 + math.e**-2)], [None, 0.5, 1 / (1 + math.e**-1)], [None, None, 0.5]],
        ),
        (
            {"chosen": [user("why?"), assistant("a")], "rejected": [user("why?"), assistant("b")], "chosen_probs": 0.8},
            "ab",
            "chosen_probs",
            [[0.5, 0.8], [0.2, 0.5]],
        ),
        (trl(), "ab", "labels", [[0.5, 1], [0, 0.5]]),
        (trl(prompt="why?", chosen="a", rejected="b"), "ab", "labels", [[0.5, 1], [0, 0.5]]),
        (
            {"chosen": [user("why?"), assistant("a")], "rejected": [user("why?"), assistant("b")]},
            "ab",
            "labels",
            [[0.5, 1], [0, 0.5]],
        ),
    ],
)
def test_rows_of_both_projects_are_read(row, texts, form, expected) -> None:
    read = preference_row(row)
    assert read.prompt.messages == (user("why?"),) and read.responses == tuple(texts) and read.form == form
    wanted = np.array(expected, dtype=object)
    for i, j in np.ndindex(wanted.shape):
        value = 1 - wanted[j, i] if wanted[i, j] is None else wanted[i, j]
        assert math.isclose(read.preferences[i, j], value, rel_tol=1e-12)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (7, "not an object"),
        ({"prompt": "why?"}, "neither generate_0"),
        (uclaml(probability=[[0.5]]), "3x3"),
        (uclaml(probability=[[0.5, 0.7, 0.9], [0.7, 0.5, 0.8], [0.1, 0.2, 0.5]]), "P_ij \\+ P_ji"),
        (uclaml(probability=[[0.5, 7, 1], [-6, 0.5, 1], [0, 0, 0.5]]), "outside"),
        (uclaml(probability=None, rm_scores=None), "neither probability"),
        (uclaml(probability=None, rm_scores=[1, float("nan"), 2]), "finite"),
        (uclaml(probability=None, rm_scores=["a", "b", "c"]), "numbers"),
        (uclaml(generate_1=[user("other?"), assistant("b")]), "same messages"),
        (uclaml(generate_1=3), "neither a text"),
        (uclaml(generate_1=[user("why?"), assistant(" ")]), "empty"),
        (trl(rejected=[assistant("a\x00")]), "NUL"),
        (trl(rejected=[assistant("\ud800")]), "surrogate"),
        (trl(rejected=[user("b")]), "assistant"),
        (trl(prompt=None), "neither prompt nor"),
        (trl(prompt=[assistant("x")]), "assistant's"),
        (trl(chosen_probs=1.5), "outside"),
    ],
)
def test_a_row_that_is_no_preference_says_why(row, reason) -> None:
    with pytest.raises(UnusableRow, match=reason):
        preference_row(row)


def test_a_file_becomes_rollouts_and_matrices(tmp_path: Path) -> None:
    """Byte ids: <|im_end|> is 2 and closes every response, as the ChatML template does; no other token is special."""
    byte_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 259}')
    rows = [
        uclaml(),
        trl(),
        "{",
        uclaml(prompt="<|im_start|>"),
        uclaml(generate_2=[user("why?"), assistant("c<|im_end|>")]),
        uclaml(),
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "rollouts"
    manifest, counts = import_preferences(tmp_path / "rows.jsonl", model=tmp_path / "model", output=output)
    (group,) = read_rollouts(output)
    assert group.messages == (user("why?"),) and [r.text for r in group.responses] == ["a", "b", "c"]
    assert [len(r.token_ids) for r in group.responses] == [2, 2, 2]
    assert all(r.token_ids[-1] == 2 and r.finish_reason == "stop" for r in group.responses)
    assert group.prompt_text == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert counts["probability"] == 1 and manifest.vocab_size == 259
    reasons = [row["reason"] for row in manifest.quarantined]
    fragments = ["2 responses", "JSON", "contradicts", "special token", "earlier row"]
    assert [fragment for fragment, reason in zip(fragments, reasons, strict=True) if fragment not in reason] == []
    (matrix,) = map(json.loads, (output / "matrices.jsonl").read_text().splitlines())
    assert unsealed(matrix, place="the line") == {"prompt_id": group.prompt_id, "preferences": P3}


def test_parquet_files_with_their_own_columns_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    byte_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([trl(), trl(prompt=[user("how?")])]), tmp_path / "r.parquet")
    manifest, counts = import_preferences(tmp_path / "r.parquet", model=tmp_path / "model", output=tmp_path / "out")
    assert manifest.num_prompts == counts["labels"] == 2


def test_a_file_without_preferences_leaves_nothing(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "why?"}\n')
    with pytest.raises(DataError, match="no usable row.*neither generate_0"):
        import_preferences(tmp_path / "rows.jsonl", model=tmp_path / "model", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What the answers saw


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


EARLIER = [system("Answer in French."), user("Tell me of Everest"), assistant("A mountain."), user("And its height?")]


def hh(*answers: str) -> dict:
    opening = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: why?\n\nAssistant: "
    return {name: opening + text for name, text in zip(("chosen", "rejected"), answers, strict=True)}


def pair_to(question: str, **columns) -> dict:
    chosen, rejected = ([user(question), assistant(text)] for text in "ab")
    return {"chosen": chosen, "rejected": rejected, **columns}


def ultrafeedback(*ratings: float | None, told: tuple[str, ...] | None = None) -> dict:
    told = told or ("",) * len(ratings)
    completions = [
        {"response": "abcd"[k], "overall_score": rating, "custom_system_prompt": told[k], "model": "m"}
        for k, rating in enumerate(ratings)
    ]
    return {"source": "flan", "instruction": "why?", "completions": completions}


SEEN = {
    "earlier turns, the prompt alone": (
        {"prompt": "And its height?", "chosen": [*EARLIER, assistant("a")], "rejected": [*EARLIER, assistant("b")]},
        EARLIER,
    ),
    "earlier turns, the prompt as messages": (
        {"prompt": EARLIER[-1:], "chosen": [*EARLIER, assistant("a")], "rejected": [*EARLIER, assistant("b")]},
        EARLIER,
    ),
    "earlier turns in the prompt alone": (trl(prompt=EARLIER), EARLIER),
    "a system column": (
        {"system": "Answer in French.", "prompt": "why?", "chosen": "a", "rejected": "b"},
        [system("Answer in French."), user("why?")],
    ),
    "a system column and conversations": (
        {"system": "S", "chosen": [user("why?"), assistant("a")], "rejected": [user("why?"), assistant("b")]},
        [system("S"), user("why?")],
    ),
    "the same system message twice": (trl(system="S", prompt=[system("S"), user("why?")]), [system("S"), user("why?")]),
    "Orca": (
        {"system": "S", "question": "why?", "chosen": "a", "rejected": "b"},
        [system("S"), user("why?")],
    ),
    "HH": (hh("a", "b"), [user("Hi"), assistant("Yes?"), user("why?")]),
    "uclaml": (
        uclaml(
            **{f"generate_{k}": [*EARLIER, assistant(text)] for k, text in enumerate("abc")}, prompt="And its height?"
        ),
        EARLIER,
    ),
    "ShareGPT pairs": (
        {
            "conversations": [{"from": "human", "value": "why?"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [user("why?")],
    ),
    "one system prompt for all completions": (
        ultrafeedback(4, 2, told=("Be brief.", "Be brief.")),
        [system("Be brief."), user("why?")],
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_the_prompt_is_all_that_the_answers_saw(name: str) -> None:
    row, messages = SEEN[name]
    read = preference_row(row)
    assert list(read.prompt.messages) == messages
    assert read.responses[:2] == ("a", "b")


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair_to("why?", prompt="other?"), "contradicts"),
        (pair_to("why?", prompt=[system("S"), user("how?")]), "contradicts"),
        (uclaml(prompt="how?"), "contradicts"),
        (trl(system="S", prompt=[system("T"), user("why?")]), "system is not the conversation's own"),
        (trl(chosen=[assistant("b")]), "same text"),
        (trl(chosen=[assistant(" b\n")]), "same text"),
        (trl(score_chosen=6.0, score_rejected=7.0), r"score_chosen \(6\) is not above score_rejected \(7\)"),
        (trl(chosen_score=7, rejected_score=7), "is not above"),
        (trl(**{"chosen-rating": 1, "rejected-rating": 1.5}), "is not above"),
        (trl(chosen=[user("why?")]), "a response is not the assistant's"),
        (ultrafeedback(4), "1 response"),
        (ultrafeedback(4, None), "finite"),
        ({"prompt": "why?", "answers": ["a", "b"]}, "no list of objects"),
        (hh("a", "b") | {"prompt": "Human: how?\n\nAssistant:"}, "contradicts"),
    ],
)
def test_a_prompt_that_contradicts_its_answers_sets_the_row_aside(row: dict, reason: str) -> None:
    with pytest.raises(UnusableRow, match=reason):
        preference_row(row)


def test_ratings_and_ranks_order_the_responses_and_tie_where_they_are_equal() -> None:
    """Ratings 7, 3, 7 and ranks 1, 3, 1 say the same: the first and the last win over the second, and tie."""
    expected = [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    rated = preference_row(ultrafeedback(7, 3, 7))
    answers = [{"answer": text, "rank": rank, "model": "m"} for text, rank in zip("abc", (1.0, 3.0, 1.0), strict=True)]
    ranked = preference_row({"prompt": "\n\nHuman: why?\n\nAssistant: ", "answers": answers, "good_natured": True})
    for read, form in ((rated, "overall_score"), (ranked, "rank")):
        assert read.preferences.tolist() == expected
        assert (read.form, read.responses, read.prompt.messages) == (form, ("a", "b", "c"), (user("why?"),))


def imported(tmp_path: Path, rows: list[dict], jinja: str | None = None, **settings):
    byte_tokenizer(tmp_path / "model")
    if jinja is not None:
        (tmp_path / "model" / "chat_template.jinja").write_text(jinja)
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 259}')
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return import_preferences(tmp_path / "rows.jsonl", model=tmp_path / "model", output=tmp_path / "out", **settings)


def test_system_prompts_that_differ_within_a_row_are_counted_as_lost(tmp_path: Path) -> None:
    _, counts = imported(
        tmp_path, [ultrafeedback(4, 2, told=("Be brief.", "Be true.")), ultrafeedback(2, 4) | {"instruction": "how?"}]
    )
    assert counts == {"overall_score": 2, "lost_system_prompts": 1}


@pytest.mark.counts("bad inputs")
def test_completions_beside_a_pair_may_be_anything(tmp_path: Path) -> None:
    """Texts are not read; what each was told is no text in the second row, and cannot be said to anybody."""
    pair = {"prompt": "why?", "chosen": "a", "rejected": "b"}
    untold = {"completions": [{"custom_system_prompt": ["Be brief."]}, {"custom_system_prompt": ["Be brief."]}]}
    manifest, counts = imported(tmp_path, [pair | {"completions": ["a", "b", None]}, pair | untold])
    assert counts == {"labels": 1}
    assert [entry["reason"] for entry in manifest.quarantined] == ["system is no text"]


OPEN_THINK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_answers_inside_an_open_think_are_set_aside_and_the_reason_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [trl(), trl(chosen=[assistant("steps</think>c")])]
    with pytest.raises(DataError, match="no usable row .2 set aside; the first: the chat template renders"):
        imported(tmp_path, rows, OPEN_THINK)
    assert any("goes on with '<think>" in record.getMessage() for record in caplog.records)
    assert not (tmp_path / "out").exists()


def test_template_arguments_are_recorded(tmp_path: Path) -> None:
    template = OPEN_THINK.replace("<think>\n{%", "{{ '<think>\\n' if thinking }}{%")
    settings = TemplateConfig(chat_template_kwargs=("thinking=false",))
    manifest, _ = imported(tmp_path, [trl()], template, template=settings)
    assert manifest.sampling["chat_template_kwargs"] == {"thinking": False}
    with pytest.raises(DataError, match="no usable row"):
        imported(tmp_path / "on", [trl()], template, template=TemplateConfig(chat_template_kwargs=("thinking=true",)))


def test_a_split_takes_its_rows_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [trl(split="train"), trl(split="test", prompt=[user("how?")]), trl(prompt=[user("who?")])]
    manifest, _ = imported(tmp_path, rows, split="test")
    assert manifest.num_prompts == 1
    with pytest.raises(ConfigError, match="Use --split with one of: test, train"):
        imported(tmp_path / "other", rows, split="dev")
    assert imported(tmp_path / "all", rows)[0].num_prompts == 3
    assert any("several splits are taken together (test, train)" in record.getMessage() for record in caplog.records)
