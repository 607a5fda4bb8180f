"""Part of a file's text, divided where the document is: pages, slides, sheets, sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from ropewalk.files.documents import Document, Section

PREVIEW = 30_000  # characters of text on one page
SHEETS = 200


@dataclass(frozen=True)
class Picture:
    """What a page looks like, and how large it is."""

    at: str
    width: int
    height: int


@dataclass(frozen=True)
class Sheet:
    """A page, slide, sheet or section of the text, or the part of it that is on this page."""

    heading: str | None
    text: str
    picture: Picture | None


@dataclass(frozen=True)
class Preview:
    """Part of a file's text, or the sentence that says why there is none."""

    sheets: tuple[Sheet, ...] = ()
    extent: str = ""
    earlier: str | None = None
    later: str | None = None
    problem: str | None = None
    left_out: int = 0  # sections that were too many for one page


def preview_of(document: Document, path: str, start: int) -> Preview:
    """The part of a document's text that begins at `start`, divided where the document is."""
    length = len(document.text)
    start = min(max(0, start), length)
    end = min(start + PREVIEW, length)
    pictures = {drawn.number: Picture(f"{path}/pages/{drawn.number}", drawn.width, drawn.height) for drawn in document.images}
    # A section without text, such as a scanned page, is shown where it lies.
    shown = [
        s
        for s in document.sections
        if (s.start < end and s.end > start) or (start <= s.start == s.end and (s.end < end or end == length))
    ]
    sheets = [
        Sheet(_heading(s, start), document.text[max(s.start, start) : min(s.end, end)].strip("\n"), pictures.get(s.number))
        for s in shown[:SHEETS]
    ]
    if not document.sections:
        sheets = [Sheet(None, document.text[start:end], None)] if length else [Sheet(None, "", p) for p in pictures.values()]
    return Preview(
        sheets=tuple(sheets),
        extent=_extent(document),
        earlier=f"{path}?{urlencode({'from': max(0, start - PREVIEW)})}#preview" if start else None,
        later=f"{path}?{urlencode({'from': end})}#preview" if end < length else None,
        problem=None if sheets else "This file holds no text.",
        left_out=len(shown) - SHEETS if len(shown) > SHEETS else 0,
    )


def _heading(section: Section, start: int) -> str | None:
    label = f"{section.kind.capitalize()} {section.number}" if section.kind != "section" else ""
    words = ": ".join(word for word in (label, section.title or "") if word)
    return (words + (", continued" if section.start < start else "")) or None


def _extent(document: Document) -> str:
    counted = [f"{n:,} {kind}{'' if n == 1 else 's'}" for kind, n in _counted(document.sections) if kind != "section"]
    if document.text:
        counted.append(f"{len(document.text):,} characters")
    elif document.images and not document.sections:
        counted = [f"{document.images[0].width:,} × {document.images[0].height:,} pixels"]
    return " · ".join(counted)


def _counted(sections: Sequence[Section]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for section in sections:
        counts[section.kind] = counts.get(section.kind, 0) + 1
    return list(counts.items())
