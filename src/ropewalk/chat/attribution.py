"""Which piece of a document a statement rests on, by exact words alone: for models that write no markers.

A piece supports a statement if the statement stands in it as it is, or if all names and numbers that the statement brings (those
the question did not) stand in it letter for letter, and most of its other words too. Where two pieces do so equally well, none is
cited: a citation that is missing misleads nobody.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

# What stands between blanks, without the punctuation around it; ".ke" and "#3" keep what belongs to them.
WORD = re.compile(r"[.#@$€£]?\w+(?:[.,:'’/@%-]+\w+)*%?")
# Scripts without blanks: two characters at a time.
JOINED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
NUMERAL = re.compile("[〇零一二三四五六七八九十百千万億兆]+")
LINKED = str.maketrans("", "", "-'’")  # what may stand within a word that is no name
SHORT = 3  # lower-case words up to this length are taken for function words, whatever the language
NAME, OTHER = 3, 1  # what a name or number weighs, and another word
SHARE = 0.5  # of the statement's weight that must stand in the piece


class Attribution:
    """The pieces of one request, by their words."""

    def __init__(self, pieces: Sequence[str], question: str = "") -> None:
        """`question`: what was asked, whose words a reply repeats without taking them from a document."""
        self._pieces = pieces
        self._asked = _either(_split(question))

    def supporter(self, statement: str) -> int | None:
        """The index of the one piece that supports the statement."""
        said = statement.strip().rstrip(".!?。").strip()
        names, others = self._weighed(said)
        if len(said) < 2 or not names | others:
            return None
        whole = {i for i, piece in enumerate(self._pieces) if _stands_in(said, piece)}
        if len(whole) == 1:
            return whole.pop()
        brought = {name for name in names if not {name, name.casefold()} & self._asked}
        added = others - self._asked
        if not brought and len(added) < 2:
            return None
        found: list[tuple[int, int]] = []
        for i in whole or self._holding(brought, added):
            shared = added & self._words[i]
            weight, full = NAME * len(brought) + OTHER * len(shared), NAME * len(brought) + OTHER * len(added)
            if weight >= SHARE * full and (shared or any(len(name) > 1 for name in brought)):
                found.append((len((names | others) & self._words[i]), i))
        found.sort(reverse=True)
        if not found or (len(found) > 1 and found[0][0] == found[1][0]):
            return None
        return found[0][1]

    def _weighed(self, statement: str) -> tuple[set[str], set[str]]:
        """The statement's names and numbers, as they stand; its other words, in lower case."""
        names: set[str] = set()
        others: set[str] = set()
        for place, word in enumerate(_split(statement)):
            letters = word.translate(LINKED).isalpha()
            begins = place == 0 and word[1:].islower() and not self._named(word)
            if JOINED.match(word):
                (names if NUMERAL.fullmatch(word) else others).add(word)
            elif word[0].islower() or (letters and begins):  # units, such as km2, are no names
                others |= {word.casefold()} if len(word) > SHORT else set()
            elif len(word) > 1 or not letters:
                names.add(word)
        return names, others

    def _named(self, word: str) -> bool:
        """Whether a word that begins a statement is a name: the documents write it so, and never in lower case."""
        return len(word) > SHORT and bool(self._holders.get(word)) and word.casefold() not in self._written

    def _holding(self, names: set[str], others: set[str]) -> set[int]:
        """The pieces that hold all of the names, or, where there are none, any of the other words."""
        if names:
            return set.intersection(*(self._holders.get(name, set()) for name in names))
        return set[int]().union(*(self._holders.get(word, set()) for word in others))

    @cached_property
    def _words(self) -> list[set[str]]:
        return [_either(_split(piece)) for piece in self._pieces]

    @cached_property
    def _written(self) -> set[str]:
        return {word for piece in self._pieces for word in _split(piece)}

    @cached_property
    def _holders(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for i, words in enumerate(self._words):
            for word in words:
                found.setdefault(word, set()).add(i)
        return found


def _split(text: str) -> list[str]:
    words = [match.group() for match in WORD.finditer(JOINED.sub(" ", text))]
    for run in JOINED.findall(text):
        words += [run[i : i + 2] for i in range(max(1, len(run) - 1))] + NUMERAL.findall(run)
    return words


def _either(words: Sequence[str]) -> set[str]:
    """All words, as they stand and in lower case."""
    return {*words, *(word.casefold() for word in words)}


def _stands_in(said: str, piece: str) -> bool:
    """Whether the words stand in the piece, not within longer words or numbers."""
    place = piece.find(said)
    while place >= 0:
        before, after = piece[max(0, place - 2) : place], piece[place + len(said) : place + len(said) + 2]
        inside = (before[-1:].isalnum() and said[0].isalnum()) or (after[:1].isalnum() and said[-1].isalnum())
        # 234 is not 1,234, nor is 1,234 1,234.5
        began = before[-1:] in (",", ".") and before[:1].isdigit() and said[0].isdigit()
        goes_on = after[:1] in (",", ".") and after[1:].isdigit() and said[-1].isdigit()
        if (not inside or JOINED.match(said)) and not began and not goes_on:
            return True
        place = piece.find(said, place + 1)
    return False
