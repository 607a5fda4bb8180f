"""Documents that are longer than a model's context: cut into chunks, of which those are shown that the question's words lead to.

    index = Index([document, ...], size)
    index.choose(question, budget, cost)      the chosen chunks of each document, in its order

The index lies in memory for as long as one question is answered: it is made again faster than a sealed one would be opened. Words are
compared (BM25, letter case and accents folded) and, where an embeddings model is configured, meanings: chunks by how near their vectors
are to the question's. The two rankings become one by reciprocal rank fusion, which needs no common scale.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeVar

from ropewalk.chat.sentences import sentences
from ropewalk.files.reading import Document

T = TypeVar("T")

SIZE = 1500  # characters of a chunk
MOST_WORDS = 64  # of a question
FUSION = 60  # added to a rank before it is inverted: how little the very first places count more than those behind them
MISSES = 32  # chunks that no longer fit before the rest is left out
# Between words, as far as anybody writes it; what is left of it within one is the index's own to divide.
BETWEEN = re.compile(r"[\s\0!-/:-@\[-`{-~\u2000-\u200b\u2010-\u205f\u3000-\u303f\ud800-\udfff]+")
# Scripts without blanks between words: each character is indexed by itself, and looked for in pairs.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")


@dataclass(frozen=True)
class Chunk:
    """Some sentences of one section: `document.text[begin:end]`."""

    document: int
    number: int  # from 1, within the document
    begin: int
    end: int


def chunks(document: Document, size: int = SIZE, index: int = 0) -> list[Chunk]:
    """A document in chunks without gaps: whole sentences of one section, as many as `size` characters hold, and at least one."""
    length = len(document.text)
    edges = {edge for section in document.sections for edge in (section.start, section.end)}
    places = sorted(edges | {0, length})
    found: list[Chunk] = []
    for start, stop in pairwise(places):
        begin, end = start, start
        for first, last in sentences(document.text, start, stop):
            if last - begin > size and first > begin:
                found.append(Chunk(index, len(found) + 1, begin, first))
                begin = first
            end = last
        if end > begin:
            found.append(Chunk(index, len(found) + 1, begin, end))
    return found


class Index:
    """The words of some documents' chunks."""

    def __init__(
        self, documents: Sequence[Document], size: int = SIZE, nearness: Sequence[Sequence[float]] | None = None
    ) -> None:
        """`nearness`: for each document, how near the meaning of each of its chunks is to the question's."""
        self.documents = tuple(documents)
        self.chunks = [chunks(document, size, i) for i, document in enumerate(documents)]
        self._nearness = nearness
        self._all = [chunk for found in self.chunks for chunk in found]
        # Contentless: only the words are kept, and nothing of them outside memory.
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute("PRAGMA temp_store=MEMORY")
        self._database.execute(
            "CREATE VIRTUAL TABLE chunk USING fts5(words, content='', tokenize='unicode61 remove_diacritics 2')"
        )
        self._database.executemany(
            "INSERT INTO chunk(rowid, words) VALUES (?, ?)",
            ((number, _folded(self.text(chunk))) for number, chunk in enumerate(self._all)),
        )

    def close(self) -> None:
        self._database.close()

    def text(self, chunk: Chunk) -> str:
        return self.documents[chunk.document].text[chunk.begin : chunk.end]

    def ranked(self, question: str) -> list[Chunk]:
        """Chunks that share words with the question, best first; rare words weigh more than those that stand everywhere."""
        phrases = _phrases(question)
        if not phrases:
            return []
        asked = " OR ".join(f'"{phrase}"' for phrase in phrases)
        rows = self._database.execute("SELECT rowid FROM chunk WHERE chunk MATCH ? ORDER BY rank, rowid", (asked,))
        return [self._all[number] for (number,) in rows]

    def by_meaning(self) -> list[Chunk]:
        """All chunks, nearest to the question first; none where no meanings are known."""
        if self._nearness is None:
            return []
        told = [near for own in self._nearness for near in own]
        return [chunk for _, chunk in sorted(zip(told, self._all, strict=True), key=lambda pair: -pair[0])]

    def found(self, question: str) -> list[Chunk]:
        """Chunks that words or meaning lead to, best first."""
        return fused(self.ranked(question), self.by_meaning())

    def beginnings(self) -> list[Chunk]:
        """The first chunk of each section, one of each document in turn; then the rest, in order."""
        first: list[list[Chunk]] = []
        for document, found in zip(self.documents, self.chunks, strict=True):
            starts = {section.start for section in document.sections} | {0}
            first.append([chunk for chunk in found if chunk.begin in starts])
        turns = sorted((turn, chunk.document, chunk) for own in first for turn, chunk in enumerate(own))
        taken = {(chunk.document, chunk.number) for _, _, chunk in turns}
        rest = [chunk for chunk in self._all if (chunk.document, chunk.number) not in taken]
        return [chunk for _, _, chunk in turns] + rest

    def choose(self, question: str, budget: int, cost: Callable[[str], int]) -> list[list[Chunk]]:
        """The chunks of each document that are shown, in its order: the best of all within the budget.

        A question whose words stand nowhere is shown how each section begins.
        """
        chosen: list[Chunk] = []
        missed = 0
        for chunk in self.found(question) or self.beginnings():
            price = cost(self.text(chunk))
            if price <= budget:
                budget -= price
                chosen.append(chunk)
            elif (missed := missed + 1) == MISSES:
                break
        chosen.sort(key=lambda chunk: (chunk.document, chunk.number))
        by_document = {i: list(own) for i, own in groupby(chosen, lambda chunk: chunk.document)}
        return [by_document.get(i, []) for i in range(len(self.documents))]


def fused(*rankings: Sequence[Chunk]) -> list[Chunk]:
    """Several rankings as one: what stands far in front in any of them does so here."""
    scores: dict[Chunk, float] = {}
    for ranking in rankings:
        for place, chunk in enumerate(ranking, 1):
            scores[chunk] = scores.get(chunk, 0.0) + 1 / (FUSION + place)
    return sorted(scores, key=lambda chunk: (-scores[chunk], chunk.document, chunk.number))


def fitted(
    index: Index,
    question: str,
    made: Callable[[list[list[Chunk]]], T],
    length: Callable[[T], int],
    room: int,
    most: int,
    cost: Callable[[str], int],
) -> tuple[T, list[list[Chunk]]] | None:
    """What is made of the chunks that fit: at most `room` long, with at most `most` of chunks. None where none fits."""
    nothing = made([[] for _ in index.documents])
    budget = min(most, room - length(nothing))
    while budget > 0:
        chosen = index.choose(question, budget, cost)
        if not any(chosen):
            return None
        found = made(chosen)
        over = length(found) - room
        if over <= 0:
            return found, chosen
        budget -= max(over, budget // 8)  # what stands between chunks, and sentences' numbers, has a length of its own
    return None


def joined(chosen: Sequence[Chunk]) -> tuple[tuple[int, int], ...]:
    """The spans of chunks in order; those that follow one another are one."""
    spans: list[tuple[int, int]] = []
    for chunk in chosen:
        if spans and spans[-1][1] == chunk.begin:
            spans[-1] = (spans[-1][0], chunk.end)
        else:
            spans.append((chunk.begin, chunk.end))
    return tuple(spans)


def _folded(text: str) -> str:
    """As it is indexed; ligatures, as PDF files have them, become letters."""
    return UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))


def _phrases(question: str) -> list[str]:
    """What is looked for: words, and pairs of characters where words are not told apart."""
    return list(dict.fromkeys(_spelt(unicodedata.normalize("NFKC", question))))[:MOST_WORDS]


def _spelt(question: str) -> Iterator[str]:
    for word in filter(None, BETWEEN.split(question)):
        for unspaced, run in groupby(word, lambda character: UNSPACED.match(character) is not None):
            part = "".join(run)
            if not unspaced or len(part) == 1:
                yield part.casefold()
            else:
                yield from (f"{a} {b}" for a, b in pairwise(part))
