"""The text of a page as lines: decoded, without what cannot be seen, and without the blank ones."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import NamedTuple

from ropewalk.errors import CardError

SCORECARDS = ("reviewer scorecard", "the panel's take", "the panel’s take")  # what a scorecard is headed with
REVIEWED = re.compile(r"reviewed:?\s([0-9]{4}-[0-9]{2}-[0-9]{2})", re.I)
ABSENT = "—"  # what a page prints for a value that it lacks
BREAK = re.compile(r"\r\n|\r|\n")
SPACE = re.compile(r"[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]")
# Controls, marks that turn or hide text, and tag characters: a reader cannot see them, so a card does not carry them. The joiners
# U+200C and U+200D stay, for scripts and emoji are spelt with them.
HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
SURROGATE = re.compile("[\ud800-\udfff]")


class Line(NamedTuple):
    """A line that is not blank, with its number in the text; a tuple, for a page may have half a million."""

    number: int
    text: str
    label: str  # the text, folded and without the marks of headings and bold


def decoded(raw: bytes) -> str:
    """Bytes as text: UTF-8, or UTF-16 where they begin with its mark."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CardError(f"byte {error.start} is not {encoding}; expected a page saved as UTF-8 text", line) from error


def clean(text: str) -> tuple[list[Line], int]:
    """The lines that are not blank, without what cannot be seen, and how many such characters there were."""
    visible, hidden = HIDDEN.subn("", SPACE.sub(" ", text.removeprefix("\ufeff")))
    visible = SURROGATE.sub("\ufffd", visible)
    found: list[Line] = []
    for number, line in enumerate(BREAK.split(visible), 1):
        for text in _cells(line):
            found.append(Line(number, text, text.strip("#*: ").casefold() or text))
    return found, hidden


def _cells(line: str) -> list[str]:
    """What a line holds: tabs part the cells of a table that was copied, and an empty cell after the first is a value that is missing."""
    if "\t" not in line:
        return [line.strip()] if line.strip() else []
    first, *others = (cell.strip() for cell in line.rstrip().split("\t"))
    return [cell for cell in (first, *(cell or ABSENT if first else cell for cell in others)) if cell]


def find(lines: Sequence[Line], labels: Sequence[str], start: int = 0) -> int | None:
    """Where the first line with one of the labels stands."""
    return next((n for n in range(start, len(lines)) if lines[n].label in labels), None)
