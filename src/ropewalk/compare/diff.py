"""What changed from one answer to the other, word by word, and which prompts changed, the broken ones first."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

WORD = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")  # with the space after it, so that spaces alone do not match
LINE = re.compile(r"[^\n]*\n|[^\n]+")
MOST = 4_000_000  # pairs of words that are compared, since the time grows with their product; beyond it, pairs of lines

EQUAL = 300_000  # pairs of equal words up to which every word is an anchor


class PieceKind(StrEnum):
    """Where a piece of text stands."""

    SAME = "same"
    DELETED = "deleted"  # in the old answer only
    INSERTED = "inserted"  # in the new answer only


@dataclass(frozen=True)
class Piece:
    """A piece of one answer or of both."""

    kind: PieceKind
    text: str


def word_diff(old: str, new: str) -> list[Piece]:
    """The pieces that, without the inserted, make the old answer, and without the deleted, the new one."""
    for cut in (WORD, LINE):
        before, after = cut.findall(old), cut.findall(new)
        begin = _common(before, after)
        end = _common(before[begin:][::-1], after[begin:][::-1])
        left, right = before[begin : len(before) - end], after[begin : len(after) - end]
        if len(left) * len(right) <= MOST:
            middle = _pieces(left, right)
            return _joined([(PieceKind.SAME, before[:begin]), *middle, (PieceKind.SAME, before[len(before) - end :])])
    # Too long for either: everything between what both begin and end with.
    return _joined(
        [
            (PieceKind.SAME, before[:begin]),
            (PieceKind.DELETED, left),
            (PieceKind.INSERTED, right),
            (PieceKind.SAME, before[len(before) - end :]),
        ]
    )


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _pieces(left: list[str], right: list[str]) -> Iterable[tuple[PieceKind, list[str]]]:
    # The time grows with the pairs of equal words. Where they are many, words that are everywhere are no anchors.
    theirs = Counter(right)
    alike = sum(count * theirs[word] for word, count in Counter(left).items())
    for tag, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=alike > EQUAL).get_opcodes():
        if tag == "equal":
            yield PieceKind.SAME, left[a:b]
        else:
            yield PieceKind.DELETED, left[a:b]
            yield PieceKind.INSERTED, right[c:d]


def _joined(parts: Iterable[tuple[PieceKind, list[str]]]) -> list[Piece]:
    pieces: list[Piece] = []
    for kind, words in parts:
        text = "".join(words)
        if text and pieces and pieces[-1].kind is kind:
            pieces[-1] = Piece(kind, pieces[-1].text + text)
        elif text:
            pieces.append(Piece(kind, text))
    return pieces


class Change(StrEnum):
    """What became of a prompt, in the order in which prompts are read."""

    BROKE = "broke"
    FIXED = "fixed"
    BOTH_WRONG = "both wrong"
    BOTH_RIGHT = "both right"  # in different words
    SAME = "same"  # the same text


@dataclass(frozen=True)
class Answers:
    """Two answers to one prompt, and whether each passed."""

    prompt_id: str
    old: str
    new: str
    old_passed: bool
    new_passed: bool


@dataclass(frozen=True)
class Changed:
    """A prompt and what became of it."""

    prompt_id: str
    change: Change


def change(answers: Answers) -> Change:
    """A verdict that changed counts before a text that did not: a check may depend on more than the text."""
    if answers.old_passed != answers.new_passed:
        return Change.FIXED if answers.new_passed else Change.BROKE
    if answers.old == answers.new:
        return Change.SAME
    return Change.BOTH_RIGHT if answers.new_passed else Change.BOTH_WRONG


def changes(rows: Iterable[Answers]) -> list[Changed]:
    """Every prompt with what became of it, the broken first and otherwise in the suite's order."""
    order = list(Change)
    return sorted((Changed(row.prompt_id, change(row)) for row in rows), key=lambda changed: order.index(changed.change))


def next_regression(changed: Sequence[Changed], after: str | None = None) -> str | None:
    """The broken prompt after the one that is shown; after the last the first again, and None where nothing broke."""
    broke = [one.prompt_id for one in changed if one.change is Change.BROKE]
    if not broke:
        return None
    return broke[(broke.index(after) + 1) % len(broke)] if after in broke else broke[0]
