from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.compare.badge import COLOURS, LEFT, MOST, badge
from ropewalk.compare.state import State
from ropewalk.compare.svg import escape, shorten, width

SVG = "{http://www.w3.org/2000/svg}"


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("state", State)
def test_each_state_has_a_badge_in_its_own_words(state: State) -> None:
    root = ElementTree.fromstring(badge("support-bot", state, "+6.8"))
    title = root.find(f"{SVG}title")
    assert title is not None
    assert title.text == root.get("aria-label") == f"support-bot: {state.value} +6.8"
    assert [text.text for text in root.iter(f"{SVG}text")] == ["support-bot", f"{state.value} +6.8"]
    # White text on it: WCAG 2 asks for 4.5 to 1.
    assert (1 + 0.05) / (luminance(COLOURS[state]) + 0.05) >= 4.5
    assert (1 + 0.05) / (luminance(LEFT) + 0.05) >= 4.5


@given(st.text(max_size=300), st.text(max_size=300))
def test_any_name_makes_a_badge_that_is_no_wider_than_a_phone(label: str, detail: str) -> None:
    root = ElementTree.fromstring(badge(label, State.SHIP, detail))
    assert int(root.get("width", "")) <= 2 * MOST + 30


def test_hostile_names_are_escaped() -> None:
    text = badge('"><script>alert(1)</script>', State.SKIP, "' onload='x")
    assert "<script" not in text
    assert "' onload" not in text


@given(st.text(max_size=60), st.floats(20, 200))
def test_a_shortened_text_fits_and_begins_as_the_whole(text: str, room: float) -> None:
    short = shorten(text, 12, room)
    assert width(short, 12) <= room + 1e-6
    assert short == text or (short.endswith("…") and text.startswith(short[:-1]))
    assert ElementTree.fromstring(f"<a b='{escape(text)}'/>") is not None


def test_a_text_that_fits_is_left_alone() -> None:
    assert shorten("short", 12, 100) == "short"
    assert shorten("", 12, 100) == ""
    assert width("日本", 10) == 20  # a square each
