"""A long list in a JSON object, read while it comes: the same entries however it is cut, and the same refusals."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import BadInput, TooLarge
from ropewalk.server.entries import Entries

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def read(body, cuts=()):
    entries, found = Entries("list", 10_000), []
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for begin, end in pairwise(edges):
        found += entries.feed(body[begin:end])
    return found + entries.feed(b"", last=True), entries.others


@given(
    st.lists(values, max_size=6),
    values,
    st.lists(st.integers(0, 5_000), max_size=12),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_entries_are_those_that_were_written_however_the_body_is_cut(entries, other, cuts, indent, ascii):
    body = json.dumps({"before": other, "list": entries, "after": other}, indent=indent, ensure_ascii=ascii)
    found, others = read(body.encode(errors="replace"), cuts)
    meant = json.loads(body.encode(errors="replace"))
    assert found == meant["list"]
    assert others == {**meant, "list": []}


def test_an_entry_is_there_as_soon_as_it_is_whole():
    entries = Entries("list", 100)
    assert entries.feed(b'{"list": [{"a": 1}') == [{"a": 1}]
    assert entries.feed(b', {"a": ') == []
    assert entries.feed(b"2}, 3") == [{"a": 2}]  # 3 may be the beginning of 35
    assert entries.feed(b"5]") == [35]
    assert entries.feed(b"}", last=True) == []
    assert entries.count == 3


def test_what_is_no_list_is_told_as_it_is():
    assert read(b'{"list": "text"}') == ([], {"list": "text"})
    assert read(b" {} ") == ([], {})


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"[]",
            b"x",
            b"{",
            b'{"list"',
            b'{"list": [',
            b'{"list": [1',
            b'{"list": [1}',
            b'{"list": [1,]}',
            b'{"list": [1 2]}',
        ),
        *(b'{"list": []} x', b'{"list": []}}', b"{1: 2}", b'{"a": tru}', b'{"a": "\xff"}', b'{"list": [], "list": []}'),
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body):
    for cuts in ((), range(0, len(body), max(1, len(body) // 10))):
        with pytest.raises((BadInput, TooLarge)):
            read(body, cuts)


def test_no_entry_is_larger_than_allowed_whether_it_ends_or_not():
    for body in (b'{"list": ["' + b"x" * 20_000, b'{"list": ["' + b"x" * 20_000 + b'"]}'):
        with pytest.raises(TooLarge, match=r"list\.0"):
            read(body)
