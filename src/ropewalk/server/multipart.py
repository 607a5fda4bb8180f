"""multipart/form-data as it arrives: chunks in, parts out, nothing kept but the headers of the part at hand.

A part may have a filename or none (the Claude SDK sends plain bytes without one), and files are never gathered: what a part
holds comes out as it comes in. Syntax by RFC 7578 and RFC 2046, section 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ropewalk.errors import BadInput

MAX_PARTS = 64
MAX_HEADERS = 8  # of a part
MAX_HEADER_BYTES = 4096  # of a header
MAX_PREAMBLE = 1024  # line breaks before the first boundary


@dataclass(frozen=True)
class Begin:
    """A part begins."""

    name: str
    filename: str | None
    media_type: str | None
    offset: int | None  # bytes of the body before the content of this part; None: it has no content


@dataclass(frozen=True)
class Data:
    """The next bytes of the part."""

    data: bytes


@dataclass(frozen=True)
class End:
    """The part is complete."""


Event = Begin | Data | End


class Multipart:
    """A body in parts."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise BadInput(f"Content-Type is '{content_type[:200]}'; expected multipart/form-data with a boundary")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
                max_header_count=MAX_HEADERS,
                max_header_size=MAX_HEADER_BYTES,
            )
        except FormParserError as error:
            raise BadInput(f"the boundary of multipart/form-data cannot be used: {error}") from error
        # What every client known writes after the last part: a line break, the boundary between dashes, a line break.
        self.closing = len(boundary) + 8
        self.finished = False
        self._delimiter = b"--" + boundary
        self._opening: bytes | None = b""  # what has come before the first boundary is whole; None once it is
        self._received = 0  # bytes of the chunks before this one
        self._chunk = b""
        self._events: list[Event] = []
        self._parts = 0
        self._field, self._value = b"", b""
        self._headers: dict[str, str] = {}
        self._waiting: tuple[str, str | None, str | None] | None = None  # a part whose content has not begun

    def feed(self, chunk: bytes) -> list[Event]:
        """What these bytes of the body bring."""
        if self._opening is not None:
            chunk = self._opened(chunk)
            if not chunk:
                return []
        self._chunk = chunk
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BadInput(f"the body is not multipart/form-data as its Content-Type says: {error}") from error
        self._received += len(chunk)
        events, self._events = self._events, []
        return events

    def _opened(self, chunk: bytes) -> bytes:
        """The bytes from the first boundary on, once it is whole; line breaks before it are let pass."""
        assert self._opening is not None
        self._opening += chunk
        begins = self._opening.lstrip(b"\r\n")
        blank = len(self._opening) - len(begins)
        if blank > MAX_PREAMBLE or not (begins.startswith(self._delimiter) or self._delimiter.startswith(begins)):
            raise BadInput("the body is not multipart/form-data as its Content-Type says: it does not begin with the boundary")
        if len(begins) < len(self._delimiter):
            return b""
        self._opening, self._received = None, blank
        return begins

    def close(self) -> None:
        """Raises unless the closing boundary has come: a body cut short is never taken for a whole one."""
        if not self.finished:
            raise BadInput("the body ends before its closing boundary: it was cut short, send it again")

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadInput(f"the body has more than {MAX_PARTS} parts")
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        # Latin-1 keeps every byte; names are decoded once they are taken apart.
        self._headers[self._field.decode("latin-1").lower()] = self._value.decode("latin-1").strip()
        self._field, self._value = b"", b""

    def _headers_finished(self) -> None:
        disposition, options = parse_options_header(self._headers.get("content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise BadInput("a part has no header `Content-Disposition: form-data; name=...`")
        encoding = self._headers.get("content-transfer-encoding", "binary").lower()
        if encoding not in ("binary", "8bit", "7bit"):
            raise BadInput(f"a part has Content-Transfer-Encoding '{encoding}'; expected none: form data is sent as it is")
        filename = options.get(b"filename")
        media_type, _ = parse_options_header(self._headers.get("content-type"))
        self._waiting = (
            _text(options[b"name"], "name"),
            None if filename is None else _text(filename, "filename"),
            media_type.decode("latin-1") or None,
        )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        # Bytes that looked like a boundary at the end of the last chunk come from the parser's own buffer: they lie before this chunk.
        self._begin(self._received + start if data is self._chunk else self._received - (end - start))
        self._events.append(Data(data if end - start == len(data) else data[start:end]))

    def _part_end(self) -> None:
        self._begin(None)
        self._events.append(End())

    def _end(self) -> None:
        self.finished = True

    def _begin(self, offset: int | None) -> None:
        if self._waiting is not None:
            name, filename, media_type = self._waiting
            self._waiting = None
            self._events.append(Begin(name, filename, media_type, offset))


def _text(value: bytes, what: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"the {what} of a part is not UTF-8") from None
