"""Proves that JSON is read back as it was written, and that a file which holds something else is named."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json, sha256_of_json, write_json


@pytest.mark.parametrize(
    ("content", "words"), [(None, "does not exist"), (b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON")]
)
def test_a_missing_or_damaged_json_file_is_named(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_JSON)
def test_json_reads_back_as_written(tmp_path, value):
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_not_a_number_is_no_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_the_hash_of_json_does_not_depend_on_the_order_of_keys():
    assert sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1})
    assert sha256_of_json([1, 2]) != sha256_of_json([2, 1])
