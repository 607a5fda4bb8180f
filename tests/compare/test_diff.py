from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.compare.diff import Answers, Change, Changed, Piece, PieceKind, changes, next_regression, word_diff

SAME, DELETED, INSERTED = PieceKind


def test_a_changed_word_is_deleted_and_inserted() -> None:
    assert word_diff("within 14 days, please", "within 30 days, please") == [
        Piece(SAME, "within "),
        Piece(DELETED, "14 "),
        Piece(INSERTED, "30 "),
        Piece(SAME, "days, please"),
    ]


def test_equal_empty_and_wholly_different_answers() -> None:
    assert word_diff("a b", "a b") == [Piece(SAME, "a b")]
    assert word_diff("", "") == []
    assert word_diff("", "new") == [Piece(INSERTED, "new")]
    assert word_diff("old", "") == [Piece(DELETED, "old")]
    assert word_diff("one", "two") == [Piece(DELETED, "one"), Piece(INSERTED, "two")]


@settings(deadline=None)
@given(*[st.one_of(st.text(), st.lists(st.sampled_from(["a ", "b ", "\n", "<b>", "é"])).map("".join))] * 2)
def test_the_pieces_make_both_answers(old: str, new: str) -> None:
    pieces = word_diff(old, new)
    assert "".join(piece.text for piece in pieces if piece.kind is not INSERTED) == old
    assert "".join(piece.text for piece in pieces if piece.kind is not DELETED) == new
    assert all(piece.text for piece in pieces)


@pytest.mark.parametrize("unit", ["a ", "a b ", "word\n", "x"])
def test_long_repetitive_answers_are_compared_in_time(unit: str) -> None:
    old, new = "start " + unit * 20_000 + "mid " + unit * 900, "begin " + unit * 900 + "half " + unit * 20_000
    begin = time.process_time()
    pieces = word_diff(old, new + "end")
    assert time.process_time() - begin < 3
    assert "".join(piece.text for piece in pieces if piece.kind is not DELETED) == new + "end"


def test_two_changes_in_a_long_answer_of_few_words_are_two_changes() -> None:
    lines = ['{ "name" : "x" , "value" : 1 } ,'] * 40
    old, new = list(lines), list(lines)
    new[10], new[30] = new[10].replace("1", "2"), new[30].replace("x", "y")
    pieces = word_diff("\n".join(old), "\n".join(new))
    assert [(piece.kind, piece.text) for piece in pieces if piece.kind is not SAME] == [
        (DELETED, "1 "),
        (INSERTED, "2 "),
        (DELETED, "x"),
        (INSERTED, "y"),
    ]


def row(prompt: str, old: bool, new: bool, text: str = "other") -> Answers:
    return Answers(prompt, "text", text, old, new)


ROWS = [
    row("p1", True, True, "text"),
    row("p2", True, False),
    row("p3", False, True),
    row("p4", False, False),
    row("p5", True, True),
]


def test_prompts_are_ordered_broken_first() -> None:
    assert changes([*ROWS, row("p6", True, False, "text")]) == [
        Changed("p2", Change.BROKE),
        Changed("p6", Change.BROKE),
        Changed("p3", Change.FIXED),
        Changed("p4", Change.BOTH_WRONG),
        Changed("p5", Change.BOTH_RIGHT),
        Changed("p1", Change.SAME),
    ]


def test_the_next_regression_goes_round() -> None:
    changed = changes([*ROWS, row("p6", True, False)])
    assert next_regression(changed) == next_regression(changed, "p3") == next_regression(changed, "p6") == "p2"
    assert next_regression(changed, "p2") == "p6"
    assert next_regression(changes(ROWS[2:])) is None
