from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.compare.cards import Card, Identity, Take, identity, same_tool


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Card("Quill Moor"), Card("quill-moor")),
        (Card("Quillmoor 2.1"), Card("Quillmoor v2.1")),
        (Card("Quillmoor (2.1)"), Card("QUILLMOOR 2.1")),
        (Card("Ｑuillmoor"), Card("Quillmoor")),
        (
            Card("Quillmoor", home_url="https://www.Quillmoor.example/?ref=x#top"),
            Card("Quillmoor", home_url="http://quillmoor.example"),
        ),
        (Card("Quillmoor", home_url="https://quillmoor.example"), Card("Quillmoor")),
    ],
)
def test_ways_of_writing_do_not_make_two_tools(one: Card, other: Card) -> None:
    assert same_tool(one, other)
    assert same_tool(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Card("Quillmoor 2"), Card("Quillmoor 3")),
        (Card("Quillmoor"), Card("Quillmoor 2")),
        (Card("C"), Card("C++")),
        (Card("C#"), Card("C++")),
        (Card("Quillmoor", home_url="https://a.example/x"), Card("Quillmoor", home_url="https://a.example/y")),
        (Card("!!!"), Card("???")),
    ],
)
def test_version_home_page_and_signs_do_make_two_tools(one: Card, other: Card) -> None:
    assert not same_tool(one, other)


def test_an_identity_is_of_name_version_and_home() -> None:
    card = Card("Tidepool Notes v2.0", home_url="https://www.tidepool.example/app/")
    assert identity(card) == Identity("tidepoolnotes", "2.0", "tidepool.example/app")
    assert identity(Card("Llama 4 Compact")) == Identity("llama4compact", "", "")
    assert identity(Card("x", home_url="http://[")).home == identity(Card("x", home_url="javascript:1")).home == ""


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_name_and_link_have_an_identity(name: str, url: str) -> None:
    card = Card(name, home_url=url)
    assert same_tool(card, card)


def test_a_take_without_anything_is_missing_and_a_card_cannot_be_changed() -> None:
    assert Take("Builder").missing
    assert not Take("Builder", stance="ship").missing
    with pytest.raises(FrozenInstanceError):
        Card("x").name = "y"  # type: ignore[misc]
