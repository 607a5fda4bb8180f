"""Citations: what is cited stands in the source, letter for letter, however the reply came."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.chat.attribution import Attribution
from ropewalk.chat.citations import Citable, Citables, wanted
from ropewalk.chat.citing import Citing
from ropewalk.chat.messages import BlockEnded, BlockStarted, CitationAdded, Delta, FileId, MessagesRequest, Text, Thinking, Turn
from ropewalk.chat.messages import Document as Asked
from ropewalk.errors import BadInput
from ropewalk.files.reading import Document, Section

LEASE = "The flat is in Oslo. The rent is 900 euros. It is due on the first. The deposit is 1,800 euros."
PAGES = ("The first page. It says one.", "The second page. It says two.", "The third page.")


def plain(text, **more):
    return Citable(Document("text/plain", text, (Section("section", 1, "", 0, len(text)),), ()), **more)


def sectioned(kind, texts, seam="\n\n", **more):
    sections, place = [], 0
    for number, text in enumerate(texts, 1):
        sections.append(Section(kind, number, "", place, place + len(text)))
        place += len(text) + len(seam)
    return Citable(Document("application/pdf", seam.join(texts), tuple(sections), ()), **more)


def said(citing, reply, cuts=()):
    """The reply's text blocks, each as (text, citations), from a stream that is cut at these places."""
    places = [0, *sorted(cuts), len(reply)]
    events = citing.feed([BlockStarted(Text(""))])
    for begin, end in zip(places, places[1:]):  # noqa: RUF007
        events += citing.feed([Delta(reply[begin:end])])
    events += citing.feed([BlockEnded()])
    blocks = []
    for event in events:
        match event:
            case BlockStarted():
                assert not blocks or blocks[-1][2], "the block before has ended"
                blocks.append(["", [], False])
            case Delta(text):
                assert not blocks[-1][1], "citations stand after the text they support"
                blocks[-1][0] += text
            case CitationAdded(citation):
                blocks[-1][1].append(citation)
            case BlockEnded():
                blocks[-1][2] = True
    assert all(ended and text for text, _, ended in blocks)
    return [(text, found) for text, found, _ in blocks]


def marked(*citables):
    return Citing(Citables(citables or (plain(LEASE, title="Lease", file_id="file_1"),)))


def test_sentences_are_numbered_and_nothing_else_changes():
    citables = Citables([plain("  One is here. Two is\nthere.\n\n---\n\nThree.\n"), plain("Four.")])
    assert citables.shown(0, numbered=True) == "  [1] One is here. [2] Two is\nthere.\n\n---\n\n[3] Three.\n"
    assert citables.shown(1, numbered=True) == "[4] Four."
    assert citables.shown(0, numbered=False) == citables.citables[0].text


def test_a_marker_becomes_a_citation_of_the_claim_before_it():
    blocks = said(marked(), "It costs 900 euros [2]. That is all. The deposit is twice that.[4] Fine.")
    assert [text for text, _ in blocks] == ["It costs 900 euros. ", "That is all. ", "The deposit is twice that. ", "Fine."]
    first = blocks[0][1][0]
    assert (first.kind, first.text, first.start, first.end) == ("char_location", "The rent is 900 euros.", 21, 43)
    assert (first.document, first.title, first.file_id) == (0, "Lease", "file_1")
    assert [len(found) for _, found in blocks] == [1, 0, 1, 0]


def test_several_markers_support_one_claim():
    ((text, found),) = said(marked(), "It is due at once [2-3][4] [1, 2-3].")
    assert text == "It is due at once."
    assert [c.text for c in found] == [
        "The rent is 900 euros. It is due on the first.",
        "The deposit is 1,800 euros.",
        "The flat is in Oslo.",
    ]


def test_two_claims_in_one_sentence_are_two_blocks():
    blocks = said(marked(), "The rent is 900 [2], and the deposit 1,800 [4].")
    assert [(text, len(found)) for text, found in blocks] == [("The rent is 900, ", 1), ("and the deposit 1,800.", 1)]


def test_a_marker_that_names_nothing_is_not_shown():
    for reply in ("One thing [9].", "One thing [0].", "One thing [3-1].", "One thing [1-9]."):
        assert said(marked(), reply) == [("One thing.", [])]
    assert said(marked(), "a[i] and [x](y) and [ and [3") == [("a[i] and [x](y) and [ and [3", [])]


def test_a_range_over_two_documents_is_dropped():
    assert said(marked(plain("One."), plain("Two.")), "Both [1-2].") == [("Both.", [])]


def test_pages_are_cited_from_one_and_end_after_the_last():
    citables = Citables([plain("Other."), sectioned("page", PAGES, file_id="file_2")])
    one, two = citables.cite(3, 3), citables.cite(3, 4)
    assert (one.kind, one.text, one.start, one.end, one.document) == ("page_location", "It says one.", 1, 2, 1)
    assert (two.text, two.start, two.end) == ("It says one.\n\nThe second page.", 1, 3)


def test_blocks_of_the_callers_are_cited_whole():
    citables = Citables([sectioned("block", ["One. Two. ", "", "Three."], "\n", title="Notes")])
    assert len(citables.pieces) == 2
    cited = citables.cite(1, 2)
    assert (cited.kind, cited.text, cited.start, cited.end) == ("content_block_location", "One. Two. Three.", 0, 3)


def test_search_results_are_counted_apart():
    citables = Citables([plain("One."), sectioned("block", ["Two."], found_at="https://a.example"), plain("Three.")])
    found = [citables.cite(n, n) for n in (1, 2, 3)]
    assert [(c.kind, c.document, c.found_at) for c in found] == [
        ("char_location", 0, None),
        ("search_result_location", 0, "https://a.example"),
        ("char_location", 1, None),
    ]


def test_only_what_is_shown_of_a_document_can_be_cited_and_offsets_stay_those_of_the_whole():
    citables = Citables([plain(LEASE, parts=((21, 43), (68, len(LEASE))))])
    assert citables.shown(0, numbered=True) == "[1] The rent is 900 euros.\n[...]\n[2] The deposit is 1,800 euros."
    assert citables.cite(2, 2).start == 68


def test_a_text_with_markers_of_its_own_gets_others():
    citables = Citables([plain("As shown before [3]. It rains [1].")])
    assert citables.shown(0, numbered=True) == "[s1] As shown before [3]. [s2] It rains [1]."
    assert "[s3]" in citables.instruction
    blocks = said(Citing(citables), "It rains [1], they say [s2].")
    assert [(text, len(found)) for text, found in blocks] == [("It rains [1], they say.", 1)]


def test_thinking_and_calls_pass_as_they_are():
    events = [BlockStarted(Thinking("")), Delta("Sentence [2] says so. Yes [1]."), BlockEnded()]
    assert marked().feed(events) == events


def test_the_first_sentence_is_not_held_back():
    citing = marked()
    citing.feed([BlockStarted(Text(""))])
    assert citing.feed([Delta("The rent")]) == [BlockStarted(Text("")), Delta("The rent")]
    assert citing.feed([Delta(" is [")]) == [Delta(" is")]
    assert citing.feed([Delta("2].")]) == [Delta(".")]


@given(st.text(max_size=300), st.lists(st.integers(1, 12), max_size=6), st.booleans())
def test_all_that_is_cited_stands_at_its_offsets(text, numbers, in_pages):
    half = len(text) // 2
    citables = Citables([sectioned("page", [text[:half], text[half:]]) if in_pages else plain(text)])
    for first in numbers:
        cited = citables.cite(first, min(first + 1, len(citables.pieces)))
        assert (cited is None) == (first > len(citables.pieces))
        if cited is not None and not in_pages:
            assert citables.citables[0].text[cited.start : cited.end] == cited.text
        if cited is not None and in_pages:
            pages = citables.citables[0].document.sections[cited.start - 1 : cited.end - 1]
            assert cited.text in citables.citables[0].text[pages[0].start : pages[-1].end]


REPLY = st.lists(
    st.sampled_from([
        "The rent is 900 euros", " [2]", "[4]", "[2-3]", "[12]", ".", ". ", " ", "\n", "The deposit", " Oslo", "[", "]", "[x]", "   ", "is", "[ 2 ]",
        "。", "雨", "- ", "[1, 3]", "Dr. ", '"', "   \t  ",
    ]) | st.text(max_size=4),
    max_size=25,
).map("".join)  # fmt: skip


@settings(max_examples=300)
@given(REPLY, st.data())
def test_blocks_together_are_the_reply_without_its_markers_however_it_was_cut(reply, data):
    cuts = data.draw(st.lists(st.integers(0, len(reply)), max_size=8))
    source = plain(LEASE)
    citing = Citing(Citables([source]))
    blocks = said(citing, reply, cuts)
    assert "".join(text for text, _ in blocks) == citing.marker.sub("", reply)
    assert blocks == said(Citing(Citables([source])), reply)
    assert all(LEASE[c.start : c.end] == c.text for _, found in blocks for c in found)


@given(REPLY)
def test_without_numbers_in_the_prompt_every_word_of_the_reply_is_shown(reply):
    blocks = said(Citing(Citables([plain(LEASE)]), marked=False), reply)
    assert "".join(text for text, _ in blocks) == reply


@pytest.mark.parametrize(
    ("statement", "question", "number"),
    [
        ("900 euros", "How much is the rent?", 1),
        ("The rent is 900 euros.", "How much is the rent?", 1),
        ("Oslo (city, from the file)", "Where is the flat?", 0),
        ("1,800", "What is the deposit?", 3),
        ("1,800 (deposit in m2)", "What is the deposit?", 3),
        ("800", "What is the deposit?", None),  # a part of a number is another number
        ("The rent is 950 euros.", "How much is the rent?", None),
        ("The flat is in Bergen.", "Where is the flat?", None),
        ("euros", "In which money?", None),  # stands in two
        ("Yes.", "Is it due on the first?", None),
        ("I do not know.", "Who owns it?", None),
    ],
)
def test_without_markers_a_statement_is_cited_by_its_words(statement, question, number):
    pieces = [piece.strip() + "." for piece in LEASE.split(". ")]
    assert Attribution(pieces, question).supporter(statement) == number


def test_attribution_knows_scripts_without_blanks():
    pieces = ["家賃は九百ユーロです。", "敷金は二か月分です。"]
    assert Attribution(pieces, "敷金はいくらですか").supporter("二か月分") == 1
    assert Attribution(pieces, "敷金はいくらですか").supporter("三か月分") is None


def test_words_alone_cite_where_no_marker_was_written():
    blocks = said(Citing(Citables([plain(LEASE)]), "How much is the rent?", marked=False), "It is 900 euros. Anything else?")
    assert [(text, [c.text for c in found]) for text, found in blocks] == [
        ("It is 900 euros. ", ["The rent is 900 euros."]),
        ("Anything else?", []),
    ]


def test_the_form_of_replies_admits_markers_of_pieces_alone():
    for count in (1, 9, 10, 37, 100, 205):
        form = re.compile(Citables([plain("Word one. " * count)]).form)
        for number in range(1300):
            assert bool(form.fullmatch(f"A claim [{number}].")) == (1 <= number <= count), (count, number)
        assert form.fullmatch("a[i], [[x]], [1-1] and so\non")
    form = re.compile(Citables([plain("It rains [1]. It pours.")]).form)
    assert form.fullmatch("A claim [1] [some] [s1].")
    assert not form.fullmatch("A claim [s3].")
    assert not re.fullmatch(Citables([]).form, "[1]")


def test_documents_are_cited_all_or_none():
    def asked(*citations, schema=None):
        documents = tuple(Asked(FileId("file_1"), citations=on) for on in citations)
        return MessagesRequest("m", 1, (Turn("user", documents),), schema=schema)

    assert wanted(asked(True, True))
    assert not wanted(asked(False))
    assert not wanted(asked())
    with pytest.raises(BadInput, match="all, or for none"):
        wanted(asked(True, False))
    with pytest.raises(BadInput, match="format"):
        wanted(asked(True, schema={}))
