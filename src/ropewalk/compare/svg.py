"""Text in drawings: safe inside XML, and about as wide as it will be."""

from __future__ import annotations

import html
import re
import unicodedata

ILLEGAL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)  # in XML, or turning the text around


def escape(text: str) -> str:
    """The text as content or attribute of an element."""
    return html.escape(ILLEGAL.sub("\ufffd", text), quote=True)


def width(text: str, size: float) -> float:
    """About how wide a text is in a sans-serif face of a size: fonts differ, and wide scripts fill a square."""
    return sum(_share(character) for character in text) * size


def _share(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF":
        return 1.0
    if character in "iljtfI.,:;'|! ()[]":
        return 0.36
    return 0.72 if character.isupper() or character in "mwMW%@+" else 0.6


def shorten(text: str, size: float, room: float) -> str:
    """The text, cut with an ellipsis where it is wider than there is room."""
    used = 0.0
    dots = width("…", size)
    for at, character in enumerate(text):
        used += _share(character) * size
        if used > room - dots and width(text[at:], size) + used - _share(character) * size > room:
            return text[:at].rstrip() + "…"
    return text
