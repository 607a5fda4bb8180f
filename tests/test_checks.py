"""Checks: what each kind lets pass, what it does not, and what is wrong with one is said when it is read."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.checks import KINDS, CheckSpec, check_reference, contains, exact_match, parse_check, score
from ropewalk.errors import BadInput


def passed(check: object, answer: str, reference: str = "") -> bool:
    spec = parse_check(check)
    check_reference(spec, reference)
    outcome = score(spec, answer, reference)
    assert outcome.detail
    return outcome.passed


def test_white_space_and_unicode_composition_do_not_matter() -> None:
    assert exact_match(" São  Tomé\n", "Sa\u0303o Tomé")
    assert not exact_match("Sao Tome", "São Tomé")


def test_letters_and_case_do_matter() -> None:
    assert not exact_match("lima", "Lima")
    assert not exact_match("Lima.", "Lima")


def test_contains_wants_whole_words() -> None:
    assert contains("The capital is Lima.", "Lima")
    assert not contains("Limassol", "Lima")
    assert contains("Limassol or Lima", "Lima")


def test_nothing_is_contained_in_nothing() -> None:
    assert not contains("", "Lima")
    assert not contains("Lima", "")


def test_exact_takes_the_reference_or_a_value_of_its_own() -> None:
    assert passed("exact", " Lima\n", "Lima")
    assert not passed("exact", "lima", "Lima")
    assert passed({"kind": "exact", "ignore_case": True}, "lima", "Lima")
    assert passed({"kind": "exact", "value": "Quito"}, "Quito", "Lima")


def test_contains_takes_one_text_or_several() -> None:
    assert passed({"kind": "contains", "value": ["30 days", "refund"]}, "A refund within 30 days.")
    assert not passed({"kind": "contains", "value": ["30 days", "refund"]}, "A refund.")
    assert passed({"kind": "contains", "value": ["30 days", "refund"], "any": True}, "A refund.")
    assert passed({"kind": "contains", "value": "sorry", "absent": True}, "No.")
    assert not passed({"kind": "contains", "value": "sorry", "absent": True, "ignore_case": True}, "Sorry, no.")
    assert passed("contains", "It is Lima.", "Lima")


def test_regex_searches_or_matches_the_whole() -> None:
    date = r"\d{4}-\d{2}-\d{2}"
    assert passed({"kind": "regex", "pattern": date}, "on 2026-11-22")
    assert not passed({"kind": "regex", "pattern": date, "full": True}, "on 2026-11-22")
    assert not passed({"kind": "regex", "pattern": date, "absent": True}, "on 2026-11-22")
    assert passed({"kind": "regex", "pattern": "LIMA", "ignore_case": True}, "Lima")


def test_no_pattern_takes_more_than_linear_time() -> None:
    began = time.perf_counter()
    for pattern in ("(a+)+$", "(a|a)*b", "(.*a){12}b"):
        assert not passed({"kind": "regex", "pattern": pattern}, "a" * 50_000 + "!")
        assert not passed({"kind": "schema", "schema": {"pattern": pattern}}, json.dumps("a" * 50_000 + "!"))
        keys = {"patternProperties": {pattern: {}}, "additionalProperties": False}
        assert not passed({"kind": "schema", "schema": keys}, json.dumps({"a" * 50_000 + "!": 1}))
    assert time.perf_counter() - began < 10  # backtracking would take longer than the sun lasts


@pytest.mark.parametrize(
    ("check", "answer", "reference", "right"),
    [
        ("numeric", "It was 7 and is 1,234.50 now.", "1234.5", True),
        ("numeric", "-12e2", "-1200", True),
        ("numeric", "\u221212", "-12", True),
        ("numeric", ".5 of it", "0.5", True),
        ("numeric", "10-5", "5", True),  # a minus after a digit is a dash
        ("numeric", "Q4 of version1.2", "4", False),  # numbers that are parts of words are none
        ("numeric", "none", "4", False),
        ("numeric", "41", "42", False),
        ({"kind": "numeric", "tolerance": 1}, "41", "42", True),
        ({"kind": "numeric", "relative": 0.05}, "40", "42", True),
        ({"kind": "numeric", "relative": 0.01}, "40", "42", False),
        ({"kind": "numeric", "take": "first"}, "42 of 50", "42", True),
        ({"kind": "numeric", "take": "only"}, "42, so 42.0", "42", True),
        ({"kind": "numeric", "take": "only"}, "42 of 50", "50", False),
        ({"kind": "numeric", "value": 0.1}, "0.1", "", True),
        ({"kind": "numeric", "value": 1e300}, "1" + "0" * 300, "", True),
        ({"kind": "numeric", "value": 1}, "9" * 400, "", False),  # infinite is no number
    ],
)
def test_numeric_compares_values(check: object, answer: str, reference: str, right: bool) -> None:
    assert passed(check, answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("(b)", True),
        (" B.\n", True),
        ("B) since A is wrong", True),
        ("The answer is B, not A.", True),
        ("First A seemed right. Answer: **B**", True),
        ("Because of B", True),
        ("A and B", False),
        ("C", False),
        ("Bee", False),
        ("", False),
    ],
)
def test_choice_wants_exactly_one(answer: str, right: bool) -> None:
    assert passed({"kind": "choice", "choices": ["A", "B", "C"]}, answer, "B") is right


def test_choices_may_be_words_and_begin_alike() -> None:
    check = {"kind": "choice", "choices": ["refund", "refund later", "no (never)"]}
    assert passed(check, "Refund later", "refund later")
    assert passed(check, "The answer is refund later.", "refund later")
    assert passed(check, "answer: no (never)", "no (never)")
    assert not passed(check, "refund later", "refund")


def test_length_counts_characters_words_or_lines() -> None:
    assert passed({"kind": "length", "most": 3}, "one two three")
    assert not passed({"kind": "length", "most": 2}, "one two three")
    assert passed({"kind": "length", "unit": "lines", "least": 2, "most": 2}, "one\ntwo\n")
    assert not passed({"kind": "length", "unit": "characters", "least": 4}, "one")


ORDER = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "currency": {"$ref": "#/$defs/currency"}},
    "required": ["id", "currency"],
    "additionalProperties": False,
    "$defs": {"currency": {"pattern": "^[A-Z]{3}$"}},
}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"id": 1, "currency": "EUR"}', "allowed"),
        ('{"id": 1}', "$: 'currency' is a required property"),
        ('{"id": "1", "currency": "EUR"}', "$.id: '1' is not of type 'integer'"),
        ('{"id": 1, "currency": "euro"}', "$.currency: 'euro' does not match"),
        ('{"id": 1, "currency": "EUR", "x": 1}', "$: 'x' is not among its properties"),
        ('{"id": NaN, "currency": "EUR"}', "no JSON: NaN is no JSON"),
        ("Here it is: {}", "no JSON"),
        ('```json\n{"id": 1, "currency": "EUR"}\n```', "no JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_schema_says_where_json_is_not_allowed(answer: str, said: str) -> None:
    outcome = score(parse_check({"kind": "schema", "schema": ORDER}), answer)
    assert outcome.passed is (said == "allowed")
    assert outcome.detail.startswith(said)


def test_schema_takes_a_fence_only_where_it_may() -> None:
    assert passed({"kind": "schema", "schema": ORDER, "fenced": True}, 'So:\n```json\n{"id": 1, "currency": "EUR"}\n```\nDone.')


def test_patterns_of_property_names_say_what_is_additional() -> None:
    check = {
        "kind": "schema",
        "schema": {"patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": {"type": "null"}},
    }
    assert passed(check, '{"x-a": "b", "y": null}')
    assert not passed(check, '{"x-a": 1}')
    assert not passed(check, '{"y": 1}')


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("Here:\n```python\ndef double(x):\n    return 2 * x\n```\nThat is all.", True),
        ("def double(x):\n    return x + x", True),
        ("def double(x):\n    return x", False),
        ("def double(x) return", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("open('/etc/passwd').read()\ndef double(x): return 2 * x", False),
        ("x = [0] * 10**9\ndef double(x): return 2 * x", False),
        ("while True: pass", False),
    ],
)
def test_code_passes_its_tests_in_a_confined_process(code: str, right: bool) -> None:
    check = {"kind": "code", "tests": "assert double(4) == 8", "seconds": 2, "memory_mb": 256}
    assert passed(check, code) is right


def test_a_judge_is_not_scored_here() -> None:
    with pytest.raises(ValueError, match="a judge is asked"):
        score(parse_check({"kind": "judge", "question": "Which is clearer?"}), "a")


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (3, "3 is no check; expected an object such as"),
        ({"pattern": "a"}, "is no check"),
        ("exakt", "'exakt' is no kind of check; did you mean 'exact'?"),
        ("xyz", "'xyz' is no kind of check; expected exact, contains"),
        ({"kind": "regex", "patern": "a"}, "has no 'patern'; did you mean 'pattern'?"),
        ({"kind": "regex"}, "needs 'pattern', a text"),
        ({"kind": "regex", "pattern": ""}, "pattern is ''; expected a text that is not empty"),
        ({"kind": "regex", "pattern": "(?=a)b"}, "there is no lookaround; write a second check, with absent: true"),
        ({"kind": "regex", "pattern": r"(a)\1"}, "there are no back-references; write out what may repeat"),
        ({"kind": "regex", "pattern": "(a"}, "missing ): (a; the syntax is RE2's"),
        ({"kind": "numeric", "tolerance": -1}, "tolerance is -1; expected a number from 0"),
        ({"kind": "numeric", "value": True}, "value is True; expected a number"),
        ({"kind": "numeric", "take": "best"}, "take is 'best'; expected one of last, first, only"),
        ({"kind": "length"}, "needs 'least', 'most' or both"),
        ({"kind": "length", "least": 5, "most": 2}, "no answer has at least 5 and at most 2"),
        ({"kind": "choice", "choices": []}, "choices is []; expected a list of texts"),
        ({"kind": "exact", "guardrail": "yes"}, "guardrail is 'yes'; expected true or false"),
        ({"kind": "schema", "schema": {"type": "objekt"}}, "the schema is none: $.type"),
        (
            {"kind": "schema", "schema": {"$ref": "https://example.org/x"}},
            "refers to 'https://example.org/x', which is not in it",
        ),
        ({"kind": "schema", "schema": {"$ref": "#/$defs/x"}}, "which is not in it; write it under '$defs'"),
        ({"kind": "schema", "schema": {"pattern": "(?=a)"}}, "there is no lookaround"),
        ({"kind": "schema", "schema": {"patternProperties": {"(?=a)": {}}}}, "there is no lookaround"),
        ({"kind": "schema", "schema": {"unevaluatedProperties": False}}, "write additionalProperties"),
        ({"kind": "code", "tests": "assert ("}, "the tests are no Python: '(' was never closed"),
        ({"kind": "code", "tests": "pass", "seconds": 900}, "seconds is 900; expected a number of seconds from 0.1 to 60"),
    ],
)
def test_what_is_wrong_with_a_check_is_said_when_it_is_read(check: object, said: str) -> None:
    with pytest.raises(BadInput) as raised:
        parse_check(check, "checks[2]")
    assert str(raised.value).startswith("checks[2]: ")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("check", "reference", "said"),
    [
        ("exact", "", "needs the prompt's 'reference', or a 'value' of its own"),
        ("numeric", "about forty", "is not one number"),
        ("numeric", "4 or 5", "is not one number"),
        ({"kind": "choice", "choices": ["A", "B"]}, "C", "is none of the choices A, B"),
    ],
)
def test_a_check_without_anything_to_hold_an_answer_against_is_refused(check: object, reference: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        check_reference(parse_check(check), reference)


def test_a_check_comes_back_from_json_as_it_was() -> None:
    spec = parse_check({"kind": "regex", "pattern": "a", "absent": True, "guardrail": True})
    assert spec == CheckSpec("regex", {"pattern": "a", "absent": True}, True)
    assert parse_check(json.loads(json.dumps(spec.as_dict()))) == spec


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3)
)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(set(KINDS) - {"code", "judge"})),
    data=st.data(),
    answer=st.text(max_size=60),
    reference=st.text(max_size=9),
)
def test_any_check_is_either_refused_in_words_or_scores_any_answer(
    kind: str, data: st.DataObject, answer: str, reference: str
) -> None:
    params = data.draw(st.dictionaries(st.sampled_from([*KINDS[kind].keys, "oops"]), VALUES, max_size=4))
    try:
        spec = parse_check({"kind": kind, **params})
        check_reference(spec, reference)
    except BadInput:
        return
    assert isinstance(score(spec, answer, reference).passed, bool)
