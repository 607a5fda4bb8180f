"""Sentences: where they end, and that nothing of a text is lost between them."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.chat.sentences import LONGEST, ended, sentences

HARD = st.text(st.sampled_from("aB 1.!?…。」\n\t-(\"')é日ไ०।,;:"), max_size=80)

WRITTEN = (
    "The rent is 900. ", "Dr. Smith asked! ", "it goes on ", "A line\n", "- an item\n", "2. another\n", "\n\n", "雨です。", "「はい。」", "e.g. this, ",
    '"Quoted." ', "Is it? ", "| a | b |\n",
)  # fmt: skip


@pytest.mark.parametrize(
    "parts",
    [
        ["The rent is 900. ", "It is due monthly."],
        ["Dr. Smith met Mr. J. Jones at 3.5 p.m. on Jan. 5. ", "They spoke."],
        ["It opens at 9 a.m. ", "The keys are inside."],
        ["See Fig. 3 and No. 7, e.g. the U.S. market. ", "Nothing else."],
        ["Is it? ", "Yes! ", '"It is." ', "Good..."],
        ["Version 2.0 costs 1.234,50 euros. ", "So it is."],
        [
            "A heading\n\n",
            "A paragraph that was wrapped by the width of the page, as in a PDF file,\nand goes on here. ",
            "End.",
        ],
        ["Things:\n", "- one\n", "- two\n\n", "- three"],
        ["1. First item\n", "2. Second item\n", "3. Third"],
        ["capital: Oslo\n", "Area: 5 km2\n", "| a | b |"],
        ["今日は雨です。", "傘が要ります！", "「はい。」", "そうです"],
        ["यह घर है। ", "वह पेड़ है।"],
        ["Wer mietet z.B. eine Wohnung? ", "Der Mieter, vgl. Abs. 2 BGB. ", "Gut."],
        ["ask 'What does it cost?' --file x. ", 'Then "Really?" - no. ', "Good."],
        ["He said (quietly.) ", "Then he left."],
    ],
)
def test_a_text_falls_into_its_sentences(parts):
    text = "".join(parts)
    assert [text[begin:end] for begin, end in sentences(text)] == parts


@given(st.one_of(st.text(max_size=200), HARD))
def test_the_sentences_of_a_text_are_the_text(text):
    spans = sentences(text)
    assert "".join(text[begin:end] for begin, end in spans) == text
    assert all(begin < end for begin, end in spans)
    assert [begin for begin, _ in spans[1:]] == [end for _, end in spans[:-1]]


@given(HARD, st.integers(0, 80), st.integers(0, 80))
def test_the_sentences_of_a_part_stay_within_it(text, one, other):
    begin, end = sorted(min(place, len(text)) for place in (one, other))
    assert "".join(text[a:b] for a, b in sentences(text, begin, end)) == text[begin:end]


@given(st.lists(st.sampled_from(WRITTEN), max_size=8).map("".join))
def test_a_text_that_comes_bit_by_bit_ends_its_sentences_where_the_whole_does(text):
    edges = {begin for begin, _ in sentences(text)}
    begin = 0
    found = {0} if text else set()
    for place, character in enumerate(text):
        if not character.isspace() and ended(text[begin:place], character):
            found.add(place)
            begin = place
    assert found == edges or len(text) > LONGEST


def test_a_sentence_without_end_is_cut():
    text = "word " * 2000
    assert max(end - begin for begin, end in sentences(text)) <= LONGEST
    assert len(sentences("x" * 5000)) == 5


def test_a_long_text_is_split_quickly():
    text = "The rent is 900 euros a month. It is due on the first. " * 20_000  # a million characters
    began = time.process_time()
    assert len(sentences(text)) == 40_000
    assert time.process_time() - began < 3


@pytest.mark.parametrize("text", ["a. ", "\n", " ", "。", "(.", "x", "1.\n", ".\"'", "A. B.\n\n"])
def test_no_text_takes_longer_than_its_length(text):
    began = time.process_time()
    sentences(text * (300_000 // len(text)))
    assert time.process_time() - began < 3
