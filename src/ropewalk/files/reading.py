"""A file's bytes as a Document: text in sections with exact offsets, and what can be drawn. What documents.py calls in a sandbox.

One reader in readers/ for each kind of file. Nothing here is asynchronous or knows of the store, so that a confined process starts fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ropewalk.errors import DocumentError, RopewalkError
from ropewalk.files.media import HEAD, UNKNOWN, sniff

VERSION = 1  # of the layout, and of what the readers make of a file: raised, all files are read again
MAX_CHARACTERS = 10_000_000
MAX_SECTIONS = 20_000
MAX_TITLE = 200
HEADER_BYTES = 8 << 20

OFFICE = "application/vnd.openxmlformats-officedocument."
READERS = {
    "application/pdf": "pdf",
    "text/markdown": "markdown",
    "text/x-markdown": "markdown",
    "text/html": "html",
    "application/xhtml+xml": "html",
    OFFICE + "wordprocessingml.document": "word",
    OFFICE + "presentationml.presentation": "slides",
    OFFICE + "spreadsheetml.sheet": "sheets",
    "image/png": "picture",
    "image/jpeg": "picture",
    "image/gif": "picture",
    "image/webp": "picture",
    **dict.fromkeys(("application/json", "application/jsonl", "application/x-ndjson", "application/x-jsonlines"), "text"),
    **dict.fromkeys(("application/xml", "application/yaml", "application/x-yaml", "application/toml"), "text"),
    **dict.fromkeys(
        ("application/javascript", "application/x-javascript", "application/typescript", "application/sql"), "text"
    ),
    **dict.fromkeys(("application/x-sh", "application/x-python", "application/x-ruby", "application/x-perl"), "text"),
    **dict.fromkeys(("application/x-tex", "application/x-latex", "application/x-httpd-php", "application/graphql"), "text"),
}


@dataclass(frozen=True)
class Section:
    """A page, slide, sheet or headed part: `document.text[section.start : section.end]`."""

    kind: str  # 'page', 'slide', 'sheet' or 'section'
    number: int  # from 1, within the document
    title: str  # '' where there is none
    start: int
    end: int


@dataclass(frozen=True)
class PageImage:
    """What `page_image` draws for this number, in pixels."""

    number: int
    width: int
    height: int


@dataclass(frozen=True)
class Document:
    """What a file says, as text, and what it shows."""

    media_type: str
    text: str
    sections: tuple[Section, ...]
    images: tuple[PageImage, ...]

    def to_bytes(self) -> bytes:
        """A line of JSON, then the text."""
        header: dict[str, Any] = {"version": VERSION, "media_type": self.media_type, "characters": len(self.text)}
        header["sections"] = [[s.kind, s.number, s.title, s.start, s.end] for s in self.sections]
        header["images"] = [[i.number, i.width, i.height] for i in self.images]
        return json.dumps(header).encode() + b"\n" + self.text.encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Document:
        """The way back; ValueError for anything that `to_bytes` would not have written."""
        end = data.find(b"\n", 0, HEADER_BYTES)
        header = _header(data[: max(0, end)])
        text = data[end + 1 :].decode()
        sections = tuple(Section(str(k), int(n), str(t), int(a), int(b)) for k, n, t, a, b in header["sections"])
        images = tuple(PageImage(int(n), int(w), int(h)) for n, w, h in header["images"])
        ordered = [edge for section in sections for edge in (section.start, section.end)]
        if len(text) != header["characters"] or ordered != sorted(ordered) or not all(0 <= x <= len(text) for x in ordered):
            raise ValueError("offsets do not fit the text")
        return cls(str(header["media_type"]), text, sections, images)


def _header(line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise ValueError("another version")
    return header


def read_document(data: bytes | Path, media_type: str | None, filename: str) -> Document:
    """Reads any supported file; pure, and to be called in a sandbox. DocumentError for what cannot be read."""
    from ropewalk.files.readers.draft import Draft

    if isinstance(data, Path):
        data = data.read_bytes()
    media_type, name = _reader(data[:HEAD], media_type, filename)
    draft = Draft(media_type)
    with _damage_of(media_type):
        import_module(f"ropewalk.files.readers.{name}").read(data, draft)
        return draft.document()


def read_serialised(data: bytes, media_type: str, filename: str) -> bytes:
    """`read_document`, as it travels out of the sandbox."""
    return read_document(data, media_type, filename).to_bytes()


def render_page(data: bytes, media_type: str | None, filename: str, number: int) -> bytes:
    """A page, or the picture itself, as PNG; to be called in a sandbox."""
    media_type, name = _reader(data[:HEAD], media_type, filename)
    if name not in ("pdf", "picture"):
        raise DocumentError(f"{media_type} has no pages to draw; PDF files and pictures have", "document_not_drawable")
    with _damage_of(media_type):
        png = import_module(f"ropewalk.files.readers.{name}").render(data, number)
        assert isinstance(png, bytes)
        return png


def decode_picture(data: bytes, media_type: str | None, filename: str, longest: int) -> bytes:
    """A picture as a line of JSON and its rows of red, green and blue; to be called in a sandbox."""
    media_type, name = _reader(data[:HEAD], media_type, filename)
    if name != "picture":
        raise DocumentError(f"image: {media_type} is no picture; PNG, JPEG, GIF and WebP are", "image_type_unsupported")
    with _damage_of(media_type):
        picture, before = import_module("ropewalk.files.readers.picture").pixels(data, longest)
        header = {**before, "width": picture.width, "height": picture.height}
        return json.dumps(header).encode() + b"\n" + bytes(picture.tobytes())


def _reader(head: bytes, media_type: str | None, filename: str) -> tuple[str, str]:
    """The media type and the reader for it."""
    full = sniff(head, filename, media_type)
    plain = full.partition(";")[0].strip()
    if plain in READERS:
        return full, READERS[plain]
    if plain.startswith("text/") or plain.endswith(("+json", "+xml", "+yaml")):
        return full, "text"
    raise DocumentError(
        f"{plain if plain != UNKNOWN else 'a file of an unknown type'} cannot be read as a document; PDF, DOCX, PPTX, XLSX, HTML, "
        "text of any kind and PNG, JPEG, GIF and WebP pictures can",
        "document_type_unsupported",
    )


@contextmanager
def _damage_of(media_type: str) -> Iterator[None]:
    """Whatever a library raises over hostile bytes is their fault; an error that says more, and lack of memory, pass."""
    try:
        yield
    except (RopewalkError, MemoryError):
        raise
    except Exception as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else "is damaged, or of another type"
        raise DocumentError(
            f"this file cannot be read as {media_type}: it {why} ({type(error).__name__})", "document_damaged"
        ) from error
