from __future__ import annotations

from ropewalk.checks import contains, exact_match


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
