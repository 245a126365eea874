"""A long JSON list is read as json.loads reads it, and told wrong where json.loads tells it, from small windows."""

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava.data import json_array
from llava.data.json_array import read_json_array

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def read(data: bytes, window: int) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "WINDOW_BYTES", window)
        return list(read_json_array(Path("data.json"), io.BytesIO(data)))


@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.booleans(), st.sampled_from([None, 0, 3]))
@example([1234567, -0.5e-7, True], 1, False, None)
@example(["é😀\\u😀", {"é": "\ud83d"}], 1, True, None)
def test_any_list_through_any_window(values, window, ascii_only, indent):
    try:
        data = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode()
    except UnicodeEncodeError:  # half a surrogate pair has no UTF-8
        data = json.dumps(values, indent=indent).encode()
    pieces = read(data, window)
    assert [value for _, value in pieces] == json.loads(data)
    assert [json.loads(text) for text, _ in pieces] == json.loads(data)


@given(st.lists(VALUES, min_size=1, max_size=4), st.integers(1, 40), st.data())
def test_a_damaged_list_is_refused_where_json_loads_refuses_it(values, window, data):
    text = json.dumps(values, indent=1)
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = (
        text[:at]
        + data.draw(st.sampled_from(["", "\n", "]", "}", ",", '"', "é", ":", "tru", "\\u12"]))
        + text[at + 1 :]
    )
    try:
        expected, problem = json.loads(damaged), None
    except json.JSONDecodeError as error:
        expected, problem = None, error
    if isinstance(expected, list):
        assert [value for _, value in read(damaged.encode(), window)] == expected
        return
    with pytest.raises(ValueError, match=r"malformed JSON|expected a JSON list") as caught:
        read(damaged.encode(), window)
    told = str(caught.value)
    # An opening that is no list needs no place. Newer Pythons point at a trailing comma, we at what follows it.
    if "expected a JSON list" not in told and "comma" not in problem.msg:
        assert f"line {problem.lineno}, column {problem.colno}: " in told


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_a_byte_that_is_no_utf8_is_told_by_its_place(window):
    with pytest.raises(ValueError, match=r"data\.json, byte 8: not UTF-8"):
        read('["é", "'.encode() + b"\xff" + b'"]', window)
    with pytest.raises(ValueError, match=r"data\.json, byte 2: not UTF-8"):
        read(b'["\xc3', window)


def test_a_byte_order_mark_is_no_text():
    assert read(b"\xef\xbb\xbf[1]", 2) == [("1", 1)]


def test_an_object_is_told_what_file_it_would_be():
    with pytest.raises(ValueError, match=r"found an object.*\.jsonl"):
        read(b'{"id": 1}\n{"id": 2}\n', 4)


def test_memory_does_not_grow_with_the_file():
    record = json.dumps({"id": "r", "text": "x" * 1000})
    data = f"[{','.join([record] * 6000)}]".encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "WINDOW_BYTES", 1 << 16)
        tracemalloc.start()
        count = sum(1 for _ in read_json_array(Path("data.json"), io.BytesIO(data)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 6000
    assert peak < 1 << 20  # of 6 MB
