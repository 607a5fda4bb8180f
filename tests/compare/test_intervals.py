from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ropewalk.compare.intervals import WIDE, IntervalRow, number, plot, sentences

ROWS = [IntervalRow("r16@900", 2.9, 6.8, 10.7), IntervalRow("remote-x", -1.4, 2.1, 5.6), IntervalRow("r64", -9, -6, -2.2)]
SVG = "{http://www.w3.org/2000/svg}"
INFINITE = float("inf")


def drawn(rows: list[IntervalRow], **more: object) -> ElementTree.Element:
    return ElementTree.fromstring(plot("Against what is served", rows, key="k1", **more))  # type: ignore[arg-type]


def test_every_row_is_a_sentence_too() -> None:
    assert sentences(ROWS) == [
        "r16@900: +6.8 points, 95% interval +2.9 to +10.7: better.",
        "remote-x: +2.1 points, 95% interval −1.4 to +5.6: cannot be told apart.",
        "r64: −6 points, 95% interval −9 to −2.2: worse.",
    ]
    # A win rate is read against 50, and its numbers carry no plus; a latency is better when it is lower.
    assert sentences([IntervalRow("x", 51, 58, 62)], unit="%", zero=50) == ["x: 58 %, 95% interval 51 to 62: better."]
    assert sentences([IntervalRow("x", 51, 58, 62)], zero=50, higher_is_better=False)[0].endswith("worse.")


def test_the_drawing_is_named_and_described_for_who_cannot_see_it() -> None:
    root = drawn(ROWS)
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert description is not None
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "k1-title k1-desc"
    assert (title.get("id"), title.text) == ("k1-title", "Against what is served")
    assert (description.get("id"), description.text) == ("k1-desc", " ".join(sentences(ROWS)))


def test_places_follow_the_numbers_and_marks_the_reading() -> None:
    groups = drawn(ROWS).findall(f"{SVG}g")
    assert [group.get("class") for group in groups] == ["better", "unclear", "worse"]
    marks = [group.find(f"{SVG}circle") for group in groups]
    assert [mark.get("fill") for mark in marks if mark is not None] == ["currentColor", "none", "currentColor"]
    # The axis runs from -9 to 10.7 with a twentieth of 19.7 on either side, over the 336 units between 12 and 348.
    expected = [12 + 336 * (row.mean + 9 + 0.985) / (19.7 * 1.1) for row in ROWS]
    assert [float(mark.get("cx", "")) for mark in marks if mark is not None] == pytest.approx(expected, abs=0.06)


def test_colours_come_from_the_text_around_and_nothing_needs_a_style_sheet() -> None:
    text = plot("t", ROWS, key="k")
    assert set(re.findall(r'(?:fill|stroke)="([^"]*)"', text)) == {"currentColor", "none"}
    assert "style" not in text
    assert f'viewBox="0 0 {WIDE} ' in text
    assert WIDE <= 360  # a phone


def test_names_and_titles_are_escaped() -> None:
    text = plot('<b>"t"</b>', [IntervalRow("<script>alert(1)</script>\x00\u202e", 0, 1, 2)], key='"><x', unit="<u>")
    assert "<script" not in text
    assert "<b>" not in text
    assert "<x" not in text
    assert "<u>" not in text
    ElementTree.fromstring(text)


def test_an_end_without_bound_is_an_arrow_and_no_rows_are_no_error() -> None:
    root = drawn([IntervalRow("open", -INFINITE, 1, INFINITE)])
    assert len(root.findall(f".//{SVG}g/{SVG}path")) == 2
    assert sentences([IntervalRow("open", -INFINITE, 1, 2)]) == [
        "open: +1 points, 95% interval no lower bound to +2: cannot be told apart."
    ]
    empty = drawn([]).find(f"{SVG}desc")
    assert empty is not None
    assert empty.text == "There is nothing to draw."


FINITE = st.floats(-1e12, 1e12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), st.tuples(FINITE, FINITE, FINITE).map(sorted)), max_size=5), FINITE)
def test_any_rows_are_drawn_within_the_frame(rows: list[tuple[str, list[float]]], zero: float) -> None:
    made = [IntervalRow(name, *ends) for name, ends in rows]
    ends = [zero, *(end for row in made for end in (row.low, row.high))]
    span = max(ends) - min(ends)
    assume(span == 0 or span > 1e-9 * max(map(abs, ends)))  # what a float can tell apart
    root = drawn(made, zero=zero)
    places = [float(element.get(name, 0)) for element in root.iter() for name in ("x", "x1", "x2", "cx")]
    assert all(0 <= place <= WIDE for place in places)


@pytest.mark.parametrize("ends", [(2, 1, 3), (0, 4, 3), (0, float("nan"), 1), (0, INFINITE, INFINITE)])
def test_a_row_that_is_no_interval_is_refused(ends: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="low <= mean <= high"):
        IntervalRow("x", *ends)


def test_numbers_are_written_as_people_write_them() -> None:
    assert [number(value) for value in (0, -0.04, 1.25, -1234.5, 1e9)] == ["0", "0", "1.2", "−1,234.5", "1e+09"]
    assert [number(value, sign=True) for value in (0, 2, -2)] == ["0", "+2", "−2"]
