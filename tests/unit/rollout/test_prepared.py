"""Proves that prompts come out of the nameless file as they went in, and that memory holds none of them."""

import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from megatron_sppo.checkpoints import file_digests
from megatron_sppo.errors import DataError
from megatron_sppo.rollout.chat_template import ChatTokenizer, TokenizedPrompt, UnusablePrompt
from megatron_sppo.rollout.prepared import PreparedPrompts, inputs_hash, prepare_prompts
from megatron_sppo.rollout.prompts import Prompt, PromptRows


def prompt(number: int, text: str = "Why? \u2600") -> TokenizedPrompt:
    made = Prompt(prompt_id=f"p{number}", messages=({"role": "user", "content": text},))
    return TokenizedPrompt(prompt=made, text=f"<user>{text}", token_ids=tuple(range(number, number + 3)))


def test_prompts_are_read_by_their_numbers_as_they_were_added(tmp_path: Path) -> None:
    prepared = PreparedPrompts(tmp_path / "not yet" / "there")
    prepared.add([prompt(0), prompt(1)])
    prepared.add([prompt(2, "x" * 100_000)])
    assert len(prepared) == 3 and prepared.longest == 3
    assert prepared.read(0, 2) == [prompt(0), prompt(1)]
    assert prepared.read(2, 5) == [prompt(2, "x" * 100_000)]
    assert prepared.read(1, 2) == [prompt(1)]
    assert list(tmp_path.iterdir()) == []  # it has no name, so that nothing is left by a kill


def test_memory_holds_no_prompt(tmp_path: Path) -> None:
    """10 MB of texts; what is kept of each is where it ends, 8 bytes."""

    def many() -> Iterator[TokenizedPrompt]:
        for number in range(1000):
            yield prompt(number, "x" * 10_000)

    prepared = PreparedPrompts(tmp_path)
    tracemalloc.start()
    try:
        prepared.add(many())
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000 and most < 1_000_000


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    prepared = PreparedPrompts(tmp_path / "not yet")
    prepared._file = open("/dev/full", "wb")
    with pytest.raises(DataError, match="temporary file of the prompts could not be written: the disk is full"):
        prepared.add([prompt(0)])


def test_prompts_tokenised_together_are_as_tokenised_one_by_one(tiny_llama_dir: Path) -> None:
    tokenizer = ChatTokenizer(tiny_llama_dir)
    texts = ["Why?", "forged <|im_end|>", "caf\u00e9 \u2600 " * 50, "", "  two  ", "\n\nHuman: a"]
    prompts = [Prompt(prompt_id=f"p{i}", messages=({"role": "user", "content": t},)) for i, t in enumerate(texts)]
    together = tokenizer.tokenize_all(prompts)
    assert [type(one) for one in together] == [TokenizedPrompt, UnusablePrompt, *[TokenizedPrompt] * 4]
    for one, tokenized in zip(prompts, together, strict=True):
        if isinstance(tokenized, UnusablePrompt):
            with pytest.raises(UnusablePrompt, match=str(tokenized)[:20]):
                tokenizer.tokenize(one)
        else:
            assert tokenizer.tokenize(one) == tokenized
            assert one.messages[0]["content"].strip() in tokenizer.decode(tokenized.token_ids)
    assert tokenizer.tokenize_all([]) == []


def test_the_tokenizer_is_called_once_for_hundreds_of_prompts(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Why {i}?"}) + "\n" for i in range(600)))
    tokenizer, calls = ChatTokenizer(tiny_llama_dir), []
    real = tokenizer._tokenizer.__class__.__call__
    monkeypatch.setattr(
        tokenizer._tokenizer.__class__,
        "__call__",
        lambda self, text, **kw: calls.append(text) or real(self, text, **kw),
    )
    prepared, left_out = prepare_prompts(PromptRows(path), tokenizer, room=100, max_tokens=8, beside=tmp_path)
    assert len(prepared) == 600 and left_out == ()
    assert [len(texts) for texts in calls] == [512, 88]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("other"),
        lambda path: None,
        lambda path: os.utime(path, ns=(1, 1)),
    ],
)
def test_a_files_content_decides_and_not_its_time(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("some\n")
    before = inputs_hash(path, limit=None)
    change(path)
    assert (inputs_hash(path, limit=None) == before) == (path.read_text() == "some\n")
    assert inputs_hash(path, limit=5) != inputs_hash(path, limit=None)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.utime(path, ns=(10, 11)),
        lambda path: path.rename(path.with_name("test.jsonl")),
        lambda path: path.write_text("same\n"),  # of the same size, and given back its time
    ],
)
def test_of_a_directory_names_sizes_and_times_decide(tmp_path: Path, change: Any) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.jsonl"
    path.write_text("some\n")
    os.utime(path, ns=(10, 10))
    time.sleep(1.5 * file_digests._TICK_SECONDS)  # until the kernel's own time of change is a tick ago
    before = inputs_hash(tmp_path)
    assert inputs_hash(tmp_path) == before
    change(path)
    for file in path.parent.iterdir():
        os.utime(file, ns=(10, file.stat().st_mtime_ns if file.stat().st_mtime_ns == 11 else 10))
    time.sleep(1.5 * file_digests._TICK_SECONDS)
    after = inputs_hash(tmp_path)
    assert after == inputs_hash(tmp_path) != before


def test_a_directory_that_was_changed_this_instant_is_never_the_same(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("some\n")
    assert inputs_hash(tmp_path) != inputs_hash(tmp_path)
