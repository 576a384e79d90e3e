"""Proves that the hash follows what decides token ids, and nothing else; and that tokens' texts join to the whole."""

import json

import pytest

from megatron_sppo.checkpoints.tokenizer import (
    ID_FILES,
    TEXT_FILES,
    file_hash,
    is_tokenizer_of,
    token_texts,
    tokenizer_hash,
)
from tests.models import byte_tokenizer


@pytest.fixture
def directory(tmp_path):
    for name in (*ID_FILES, *TEXT_FILES):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("name", ID_FILES)
def test_a_file_that_decides_ids_changes_the_hash(directory, name):
    before = tokenizer_hash(directory)
    (directory / name).write_text("another vocabulary")
    assert tokenizer_hash(directory) != before
    (directory / name).unlink()
    assert tokenizer_hash(directory) != before


@pytest.mark.parametrize("name", [*TEXT_FILES, "config.json", "model.safetensors"])
def test_other_files_do_not_change_it(directory, name):
    before = tokenizer_hash(directory)
    (directory / name).write_text("another text")
    assert tokenizer_hash(directory) == before


def test_the_same_files_in_two_places_have_one_hash(directory, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for name in reversed(ID_FILES):
        (copy / name).write_text(name)
    assert tokenizer_hash(copy) == tokenizer_hash(directory)
    assert len(tokenizer_hash(copy)) == 64


def test_contents_that_swap_places_are_another_tokenizer(directory):
    before = tokenizer_hash(directory)
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    vocab.write_text("merges.txt")
    merges.write_text("vocab.json")
    assert tokenizer_hash(directory) != before


def resave(directory, **changes):
    """Write tokenizer.json again as another version of the library would -> nothing; `changes` alter what it does."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content |= {"truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}}
    path.write_text(json.dumps(dict(reversed({**content, **changes}.items())), indent=7))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        ({"added_tokens": []}, False),
    ],
    ids=["spelling alone", "normaliser", "pre-tokeniser", "added tokens"],
)
def test_what_a_tokenizer_does_is_its_identity_not_how_it_is_spelled(tmp_path, change, is_same):
    byte_tokenizer(tmp_path)
    before, bytes_before = tokenizer_hash(tmp_path), file_hash(tmp_path)
    resave(tmp_path, **change)
    assert (tokenizer_hash(tmp_path) == before) == is_same
    assert is_tokenizer_of(tmp_path, [before]) == is_same
    assert file_hash(tmp_path) != bytes_before


def test_a_merge_is_one_in_both_spellings_and_another_order_is_another_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    hashes = []
    for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]], ["b c", "a bc"]):
        vocab = {token: i for i, token in enumerate(("a", "b", "c", "ab", "bc", "abc"))}
        Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(tmp_path / "tokenizer.json"))
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        hashes.append(tokenizer_hash(tmp_path))
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_identity_of_earlier_versions_still_holds(tmp_path):
    """They recorded the hash of the files: datasets and checkpoints of theirs are known again."""
    byte_tokenizer(tmp_path)
    assert is_tokenizer_of(tmp_path, [file_hash(tmp_path)])
    assert not is_tokenizer_of(tmp_path, ["0" * 64])


def test_a_directory_without_tokenizer_has_none(tmp_path):
    assert tokenizer_hash(tmp_path) is None


def test_texts_of_tokens_join_to_the_whole_text(tmp_path):
    """A token is a byte: three spell the euro sign, and the last of them has it; a special token is shown."""
    from tokenizers import Tokenizer

    byte_tokenizer(tmp_path)
    texts = token_texts(tmp_path)
    encoded = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a\u20acb<|im_end|>").ids
    assert texts(encoded) == ["a", "", "", "\u20ac", "b", "<|im_end|>"]
    assert texts(encoded[:2])[0] == "a" and len(texts(encoded[:2])) == 2  # cut within a character
    assert texts([]) == []
    assert token_texts(tmp_path / "nowhere") is None
