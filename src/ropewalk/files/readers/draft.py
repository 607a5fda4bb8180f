"""A document in the making: text goes in piece by piece, offsets come out exact."""

from __future__ import annotations

import re

from ropewalk.errors import DocumentError
from ropewalk.files.reading import MAX_CHARACTERS, MAX_SECTIONS, MAX_TITLE, Document, PageImage, Section

HALF_CHARACTERS = re.compile(r"[\ud800-\udfff]")  # which no encoding can carry


class Draft:
    """What a reader writes into."""

    def __init__(self, media_type: str) -> None:
        self.media_type = media_type
        self._pieces: list[str] = []
        self._length = 0
        self._sections: list[Section] = []
        self._open: tuple[str, str, int] | None = None
        self._images: list[PageImage] = []

    def section(self, kind: str, title: str = "", separator: str = "\n\n") -> None:
        """Whatever is written from here on belongs to a new section; the separator stands between two, in neither."""
        self._close()
        if len(self._sections) >= MAX_SECTIONS:
            raise DocumentError(f"this file has more than {MAX_SECTIONS:,} {kind}s; split it", "document_too_large")
        if self._sections:
            self.write(separator)
        self._open = (kind, _one_line(title), self._length)

    def name(self, title: str) -> None:
        """The open section's title, where it is known only now."""
        assert self._open is not None
        self._open = (self._open[0], _one_line(title), self._open[2])

    def write(self, text: str) -> None:
        """More text, of the section that was opened last."""
        if not text.isascii():
            text = HALF_CHARACTERS.sub("\ufffd", text)
        self._length += len(text)
        if self._length > MAX_CHARACTERS:
            raise DocumentError(
                f"this file has more than {MAX_CHARACTERS:,} characters of text, which is the most a document may have; split it",
                "document_too_large",
            )
        self._pieces.append(text)

    def image(self, width: int, height: int) -> None:
        """The next picture, counted from 1."""
        self._images.append(PageImage(len(self._images) + 1, width, height))

    def document(self) -> Document:
        """What was written."""
        self._close()
        return Document(self.media_type, "".join(self._pieces), tuple(self._sections), tuple(self._images))

    def _close(self) -> None:
        if self._open is not None:
            kind, title, start = self._open
            self._sections.append(Section(kind, len(self._sections) + 1, title, start, self._length))
            self._open = None


def _one_line(title: str) -> str:
    return " ".join(HALF_CHARACTERS.sub("\ufffd", title).split())[:MAX_TITLE]
