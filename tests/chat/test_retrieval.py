"""Documents beyond a model's context: chunks without gaps, and the ones that a question leads to."""

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.chat.citations import Citable, Citables
from ropewalk.chat.retrieval import Index, chunks, joined
from ropewalk.files.reading import Document, Section

NEEDLE = "The key of the lighthouse of Ålesund lies in box 4711."


def plain(text, *edges):
    places = [0, *sorted(edges), len(text)]
    sections = tuple(Section("page", n, "", a, b) for n, (a, b) in enumerate(pairwise(places), 1))
    return Document("text/plain", text, sections if edges else (), ())


def characters(text):
    return len(text)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab .!?\n。東é\u0301\0"), max_size=4000), st.data())
def test_chunks_follow_one_another_and_cross_no_section(text, data):
    edges = data.draw(st.lists(st.integers(0, len(text)), max_size=4))
    size = data.draw(st.integers(100, 1000))
    found = chunks(plain(text, *edges), size)
    assert "".join(text[chunk.begin : chunk.end] for chunk in found) == text
    assert [chunk.number for chunk in found] == list(range(1, len(found) + 1))
    assert not any(chunk.begin < edge < chunk.end for chunk in found for edge in edges)
    assert all(chunk.end - chunk.begin <= max(size, 1200) for chunk in found)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.text(max_size=80), st.integers(0, 300))
def test_no_question_breaks_the_search_and_no_choice_its_budget(text, question, budget):
    index = Index([plain(text), plain(text[::-1])], 100)
    chosen = index.choose(question, budget, characters)
    assert sum(len(index.text(chunk)) for own in chosen for chunk in own) <= budget
    for own in chosen:
        assert own == sorted(own, key=lambda chunk: chunk.begin)


def haystack(length):
    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(5000)]
    sentences = []
    while length > 0:
        sentences.append(" ".join(["the", "of", *rng.choices(words, k=14), "in"]).capitalize() + ". ")
        length -= len(sentences[-1])
    return sentences


def test_a_needle_in_two_million_characters_is_found_soon_where_it_stands():
    found = haystack(2_000_000)
    text = "".join([*found[:9000], NEEDLE + " ", *found[9000:]])
    began = time.perf_counter()
    index = Index([plain(text)])
    (chosen,) = index.choose("In which box is the key of the lighthouse of alesund?", 5000, characters)
    assert time.perf_counter() - began < 15  # 1 s on one of two busy cores
    place = text.index(NEEDLE)
    assert any(chunk.begin <= place and place + len(NEEDLE) <= chunk.end for chunk in chosen)
    assert sum(chunk.end - chunk.begin for chunk in chosen) <= 5000


def test_the_budget_goes_to_the_documents_that_the_question_is_about():
    texts = ["".join(haystack(20_000)) for _ in range(3)]
    texts[1] = " ".join(f"The rent of flat {n} is due on day {n}. It is paid to the landlord." for n in range(300))
    index = Index([plain(text) for text in texts], 500)
    first, second, third = index.choose("When is the rent due to the landlord?", 4000, characters)
    assert len(second) > len(first) + len(third)


@pytest.mark.parametrize("question", ["", "??? …", "xyzzy"])
def test_a_question_without_words_of_the_text_is_shown_how_each_section_begins(question):
    sections = [f"Chapter {n} begins here. " + f"And goes on with {n}. " * 60 for n in range(1, 6)]
    text = "".join(sections)
    edges = [len("".join(sections[:n])) for n in range(1, 5)]
    (chosen,) = Index([plain(text, *edges)], 200).choose(question, 5 * 200, characters)
    assert {0, *edges} <= {chunk.begin for chunk in chosen}


@pytest.mark.parametrize(
    ("said", "question"),
    [
        ("Das Büro öffnet um neun.", "BURO"),
        ("The \ufb01nal o\ufb00er is 900.", "final offer"),
        ("彼は東京の会社で働いています。", "東京"),
        ("गोदाम की चाबी दराज में है।", "चाबी"),
        ("He took the rent/deposit back.", "deposit?"),
    ],
)
def test_letter_case_accents_ligatures_and_scripts_without_blanks_are_seen_through(said, question):
    index = Index([plain(said), plain("Nothing of the kind stands here.")], 100)
    assert [chunk.document for chunk in index.ranked(question)] == [0]


def test_neighbours_are_shown_in_one():
    found = chunks(plain("One two three. " * 200), 300)
    assert joined([found[0], found[1], found[3]]) == ((0, found[1].end), (found[3].begin, found[3].end))


@settings(max_examples=50, deadline=None)
@given(st.integers(100, 600), st.integers(700, 3000), st.integers(0, 20))
def test_what_is_cited_of_chosen_chunks_stands_there_in_the_whole_file(size, budget, number):
    text = " ".join(f"Clause {n} binds party {n % 21}. It holds for {n} years." for n in range(400))
    document = plain(text)
    (chosen,) = Index([document], size).choose(f"Which clause binds party {number}?", budget, characters)
    parts = joined(chosen)
    citables = Citables([Citable(document, "Lease", "file_1", parts=parts)])
    assert citables.pieces
    for at, piece in enumerate(citables.pieces, 1):
        cited = citables.cite(at, at)
        assert cited is not None
        assert cited.text == text[cited.start : cited.end] == text[piece.begin : piece.end]
        assert any(begin <= cited.start < cited.end <= end for begin, end in parts)
