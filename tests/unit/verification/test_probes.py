"""Proves that a prompt which the chat template refuses costs a verification that prompt and nothing else, and that
templates are told apart by what they do with system turns, with tools, and where no answer is asked for.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from megatron_sppo.errors import DataError
from megatron_sppo.verification.probes import PROBES, compare_texts, prompt_token_ids
from tests.models import CHAT_TEMPLATE, byte_tokenizer

STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHAT_TEMPLATE
SIZES = {"vocab_size": 259, "max_position_embeddings": 512}
TEXT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(STRICT)
    return tmp_path


def written(path: Path, *systems: str) -> Path:
    rows = [{"system": system, "prompt": "Why?"} for system in systems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_prompt_that_the_template_refuses_is_left_out_and_named(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The byte tokenizer's ids: one for each byte and each of the three special tokens of the text."""
    (ids,) = prompt_token_ids(model, written(model / "rows.jsonl", "", "Be brief."), **SIZES)
    assert len(ids) == len(TEXT) - 2 * len("<|im_start|>") - len("<|im_end|>") + 3
    assert any("no system turns" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "other",
    [
        CHAT_TEMPLATE.replace("in messages", "in messages if message['role'] != 'system'"),
        CHAT_TEMPLATE + "{% if not add_generation_prompt %}.{% endif %}",
        CHAT_TEMPLATE + "{% if tools %}{{ tools | tojson }}{% endif %}",
    ],
    ids=["system turn", "no answer asked for", "tools"],
)
def test_what_a_template_does_in_one_case_alone_is_a_difference(tmp_path: Path, other: str) -> None:
    for name, template in (("one", CHAT_TEMPLATE), ("same", f"{CHAT_TEMPLATE}\n"), ("other", other)):
        byte_tokenizer(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    same, found = (compare_texts(tmp_path / "one", tmp_path / name) for name in ("same", "other"))
    assert (same["different_probes"], same["templates_same"]) == ([], True)
    assert set(found["different_probes"]) >= set(PROBES) - {""} and not found["templates_same"]


def test_where_every_prompt_is_refused_the_verification_says_so(model: Path) -> None:
    with pytest.raises(DataError, match="refuses every prompt"):
        prompt_token_ids(model, written(model / "rows.jsonl", "Be brief."), **SIZES)
