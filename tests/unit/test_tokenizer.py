"""Proves that the hash follows what decides token ids, and nothing else; and that tokens' texts join to the whole."""

import pytest

from megatron_sppo.tokenizer import ID_FILES, TEXT_FILES, token_texts, tokenizer_hash
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
