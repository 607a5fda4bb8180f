"""Plain text, code, CSV, JSON: as it stands, in one section; only its character set has to be found."""

from __future__ import annotations

import codecs
import re

from ropewalk.errors import DocumentError
from ropewalk.files.readers.draft import Draft

# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CONTROL = re.compile(r"[\x00-\x06\x0e-\x19]")
SAMPLE = 1 << 16  # bytes that a guess is made from


def read(data: bytes, draft: Draft) -> None:
    """The whole text, character for character, without a byte order mark."""
    text = decode(data, draft.media_type)
    draft.section("section")
    draft.write(text)


def decode(data: bytes, media_type: str) -> str:
    """The text of these bytes: by their mark, the declared character set, UTF-8, or a guess, in this order."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return _decode(data[len(mark) :], encoding)
    declared = re.search(r"charset\s*=\s*\"?([A-Za-z0-9_.:-]+)", media_type)
    if declared and _knows(declared.group(1)):
        return _decode(data, declared.group(1))
    if b"\0" in data[:SAMPLE]:
        return _only_text(_decode(data, _wide(data)))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _only_text(_decode(data, _guess(data)))


def _knows(name: str) -> bool:
    """Only character sets: the registry of codecs also holds compressions, with names of their own."""
    try:
        return codecs.lookup(name)._is_text_encoding
    except LookupError:
        return False


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        raise DocumentError(f"byte {at:,} of this text is not {encoding}; save it as UTF-8", "document_damaged") from error


def _only_text(guessed: str) -> str:
    if CONTROL.search(guessed, 0, SAMPLE):
        raise DocumentError("this file is not text: it has control characters; declare what it is", "document_damaged")
    return guessed


def _wide(data: bytes) -> str:
    """UTF-16 without a mark: of Latin text, half of the bytes are zero, all on the same side."""
    sample = data[:SAMPLE]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if len(data) % 2 == 0 and max(even, odd) > 0.3 * len(sample) / 2 and min(even, odd) < 0.02 * len(sample) / 2:
        return "utf-16-le" if odd > even else "utf-16-be"
    raise DocumentError("this file is not text: it has zero bytes, and is not UTF-16; declare what it is", "document_damaged")


def _guess(data: bytes) -> str:
    from charset_normalizer import from_bytes

    # Where the text leaves ASCII is where it tells its character set.
    first = re.search(rb"[\x80-\xff]", data)
    start = max(0, (first.start() if first else 0) - SAMPLE // 4)
    best = from_bytes(data[start : start + SAMPLE]).best()
    if best is None:
        raise DocumentError("this file is not text in any character set known; save it as UTF-8", "document_damaged")
    return best.encoding
