"""Lines of a suite's file: whatever stands in one, it is read or refused with its number."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.compare.suite_rows import KNOWN, Asked, read_line
from ropewalk.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "text", "exact"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "kind", "value"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(row=st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=5), VALUES, max_size=5))
def test_any_object_is_read_or_refused_with_its_line(row):
    _read_or_refused(json.dumps(row).encode())


@settings(max_examples=100, deadline=None)
@given(
    messages=st.lists(st.fixed_dictionaries({"role": st.just("user") | VALUES, "content": VALUES}), min_size=1, max_size=3),
    checks=st.lists(st.fixed_dictionaries({"kind": st.sampled_from(["exact", "regex", "schema"]) | VALUES, "value": VALUES})),
)
def test_any_conversation_is_read_or_refused_with_its_line(messages, checks):
    _read_or_refused(json.dumps({"messages": messages, "checks": checks, "reference": "a"}).encode())
    _read_or_refused(json.dumps({"messages": messages}).encode())


@settings(max_examples=100, deadline=None)
@given(line=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_with_their_line(line):
    _read_or_refused(line)


def _read_or_refused(line):
    refused = None
    try:
        asked = read_line(line, 7, "q.jsonl")
    except DataError as error:
        refused = error
    if refused is not None:
        assert refused.line == 7
        assert str(refused).startswith("q.jsonl:7: ")
        return
    assert isinstance(asked, Asked)
    assert asked.messages[-1]["role"] == "user"
    assert asked.group


@settings(max_examples=50, deadline=None)
@given(prompt=st.text(min_size=1).filter(str.strip), reference=st.text(), group=st.text(min_size=1))
def test_texts_are_taken_as_they_are(prompt, reference, group):
    asked = read_line(json.dumps({"prompt": prompt, "reference": reference, "group": group}).encode(), 1, "q.jsonl")
    assert (asked.messages, asked.reference, asked.group) == (({"role": "user", "content": prompt},), reference, group)
    assert [spec.kind for spec in asked.checks] == (["exact"] if reference.strip() else [])


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"prompt": "a", "completion": "b"}, ["exact"]),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}, ["exact"]),
        ({"prompt": "a", "reference": "b", "checks": []}, []),
        ({"prompt": "a", "check": {"kind": "length", "most": 5, "guardrail": True}}, ["length"]),
        ({"prompt": "a", "reference": "3", "checks": ["numeric", {"kind": "length", "most": 5}]}, ["numeric", "length"]),
    ],
)
def test_the_checks_of_a_row(row, kinds):
    assert [spec.kind for spec in read_line(json.dumps(row).encode(), 1, "q.jsonl").checks] == kinds
