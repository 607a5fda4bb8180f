"""Documents as citable pieces with exact offsets, and citations of them: each is checked against its source before it goes out.

    documents -> Citable -> Citables: pieces, numbered from 1 over the whole request -> Cited

Plain text and PDF are cited by sentences; a source in blocks of the caller's own by those blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ropewalk.chat.messages import Cited, MessagesRequest
from ropewalk.chat.sentences import sentences
from ropewalk.errors import BadInput
from ropewalk.files.reading import Document, Section

OMITTED = "\n[...]\n"
BRACKETED = re.compile(r"\[\s*\d")
WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Citable:
    """A document of a request, and what its citations say of it."""

    document: Document
    title: str | None = None
    file_id: str | None = None
    found_at: str | None = None  # of a search result
    parts: tuple[tuple[int, int], ...] | None = None  # what of the text is shown; None: all of it

    @property
    def text(self) -> str:
        return self.document.text

    @property
    def shown(self) -> tuple[tuple[int, int], ...]:
        return self.parts if self.parts is not None else ((0, len(self.text)),)

    def sections(self, kind: str) -> list[Section]:
        return [section for section in self.document.sections if section.kind == kind]

    def pieces(self) -> list[tuple[int, int]]:
        """The citable pieces, without the blanks around them, as offsets into the text."""
        blocks = self.sections("block")
        if blocks:
            return [(block.start, block.end) for block in blocks if WORD.search(self.text, block.start, block.end)]
        edges = {edge for section in self.document.sections for edge in (section.start, section.end)}
        found: list[tuple[int, int]] = []
        for begin, end in self.shown:
            places = [begin, *sorted(edge for edge in edges if begin < edge < end), end]
            for start, stop in pairwise(places):
                found += sentences(self.text, start, stop)
        narrowed = [_narrowed(self.text, start, stop) for start, stop in found]
        return [(start, stop) for start, stop in narrowed if WORD.search(self.text, start, stop)]

    def cited(self, begin: int, end: int, index: int) -> Cited:
        """The citation of the text between the beginning of a piece and the end of a piece."""
        touched = [s for s in self.document.sections if s.kind in ("block", "page") and s.start < end and s.end > begin]
        text, first, last = self.text[begin:end], begin, end
        if touched and touched[0].kind == "page":
            return Cited("page_location", text, index, self.title, self.file_id, touched[0].number, touched[-1].number + 1)
        if not touched:
            return Cited("char_location", text, index, self.title, self.file_id, begin, end)
        first, last = touched[0].number - 1, touched[-1].number
        text = "".join(self.text[block.start : block.end] for block in self.sections("block")[first:last])
        if self.found_at is not None:
            return Cited("search_result_location", text, index, self.title, None, first, last, self.found_at)
        return Cited("content_block_location", text, index, self.title, self.file_id, first, last)

    def holds(self, cited: Cited) -> bool:
        """Whether what a citation says stands where it says, letter for letter."""
        if not cited.text or not 0 <= cited.start < cited.end:
            return False
        if cited.kind == "char_location":
            return self.text[cited.start : cited.end] == cited.text
        if cited.kind == "page_location":
            there = [page for page in self.sections("page") if cited.start <= page.number < cited.end]
            return len(there) == cited.end - cited.start and cited.text in self.text[there[0].start : there[-1].end]
        there = self.sections("block")[cited.start : cited.end]
        return len(there) == cited.end - cited.start and "".join(self.text[b.start : b.end] for b in there) == cited.text


@dataclass(frozen=True)
class Piece:
    """A citable piece: `citables[source].text[begin:end]`."""

    source: int
    begin: int
    end: int


class Citables:
    """All documents of a request, in pieces that are numbered from 1."""

    def __init__(self, citables: Sequence[Citable], *, divided: bool = True) -> None:
        """`divided` False: nothing of them will be cited."""
        self.citables = tuple(citables)
        divisible = enumerate(self.citables if divided else ())
        self.pieces = [Piece(i, begin, end) for i, citable in divisible for begin, end in citable.pieces()]
        # What a text cites in the same form must not be taken for a citation of ours.
        self.letter = "s" if any(BRACKETED.search(citable.text) for citable in self.citables) else ""
        results = [citable.found_at is not None for citable in self.citables]
        self._index = [results[:i].count(result) for i, result in enumerate(results)]  # documents and results count apart

    def text(self, piece: Piece) -> str:
        return self.citables[piece.source].text[piece.begin : piece.end]

    def shown(self, source: int, *, numbered: bool) -> str:
        """A document's text as a model is to read it: what is shown of it, with the number of each piece before it."""
        citable = self.citables[source]
        own = [(n, piece) for n, piece in enumerate(self.pieces, 1) if piece.source == source] if numbered else []
        parts: list[str] = []
        for begin, end in citable.shown:
            out: list[str] = []
            for number, piece in own:
                if begin <= piece.begin < end:
                    out += [citable.text[begin : piece.begin], f"[{self.letter}{number}] "]
                    begin = piece.begin
            parts.append("".join([*out, citable.text[begin:end]]))
        return OMITTED.join(parts)

    def cite(self, first: int, last: int) -> Cited | None:
        """The citation of the pieces from one number to another, both included; None for what is not there."""
        if not 1 <= first <= last <= len(self.pieces) or self.pieces[first - 1].source != self.pieces[last - 1].source:
            return None
        begin, end = self.pieces[first - 1], self.pieces[last - 1]
        return self.verified(self.citables[begin.source].cited(begin.begin, end.end, self._index[begin.source]), begin.source)

    def verified(self, cited: Cited, source: int) -> Cited | None:
        """The citation, if its source holds it; all that goes out has passed here."""
        return cited if self.citables[source].holds(cited) else None

    @property
    def instruction(self) -> str:
        """What a model is told about the numbers."""
        one, several, other = (f"{self.letter}{n}" for n in (3, 5, 7))
        return (
            f"The sentences of the documents are numbered like [{one}]. After every claim that you take from a document, name the "
            f"sentences it rests on: [{one}] for one, [{one}-{several}] for several in a row, [{one}][{other}] for several apart. "
            "Name no number that is not in the documents, and do not speak of the numbers otherwise."
        )

    @property
    def form(self) -> str:
        """A regular expression of the replies whose markers all name pieces that exist."""
        letter, number = self.letter, rf"{self.letter}({_up_to(len(self.pieces))})"
        other = rf"[^{letter}\[]|{letter}[^0-9]" if letter else r"[^0-9\[]"  # after a bracket that begins no marker
        marker = rf"|\[{number}(-{number})?\]" if self.pieces else ""
        return rf"(\[*(\[({other}){marker})|[^\[])*"


def wanted(request: MessagesRequest) -> bool:
    """Whether the reply is to cite: for all documents, or for none."""
    documents = request.documents()
    count = sum(document.citations for document in documents)
    if 0 < count < len(documents):
        raise BadInput("citations are enabled for some documents and not for others; enable them for all, or for none")
    if count and request.schema is not None:
        raise BadInput("citations cannot be enabled for documents together with a format of the output; leave one of them out")
    return count > 0


def _narrowed(text: str, begin: int, end: int) -> tuple[int, int]:
    said = text[begin:end]
    first = begin + len(said) - len(said.lstrip())
    return first, max(first, begin + len(said.rstrip()))


def _up_to(most: int) -> str:
    """A regular expression of the numbers from 1 to `most`."""
    digits = str(most)
    found = [rf"[1-9][0-9]{{{n - 1}}}" if n > 1 else "[1-9]" for n in range(1, len(digits))]
    for place, digit in enumerate(digits):
        lowest, left = (1 if place == 0 else 0), len(digits) - place - 1
        if int(digit) > lowest:
            found.append(digits[:place] + f"[{lowest}-{int(digit) - 1}]" + (f"[0-9]{{{left}}}" if left else ""))
    return "|".join([*found, digits])
