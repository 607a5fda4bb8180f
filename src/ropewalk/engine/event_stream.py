"""Server-sent events on their way in: bytes, however they are cut, as the data of one event after another."""

from __future__ import annotations

from ropewalk.errors import UpstreamFailed

MOST_BYTES = 8 << 20  # of one event


class EventStream:
    """One stream. Lines end in LF or CRLF; only what lines of `data` say is kept."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that this chunk ends."""
        self._held += chunk
        if len(self._held) + sum(map(len, self._data)) > MOST_BYTES:
            raise UpstreamFailed(f"an event of the other server's reply is longer than {MOST_BYTES:,} bytes")
        if b"\n" not in chunk:
            return []
        *lines, rest = self._held.split(b"\n")
        self._held = rest
        return [event for line in lines if (event := self._line(bytes(line.removesuffix(b"\r")))) is not None]

    def finish(self) -> list[bytes]:
        """The stream is over: an event may lack its empty line."""
        held = bytes(self._held)
        self._held.clear()
        return [event for line in (held, b"") if (event := self._line(line)) is not None]

    def _line(self, line: bytes) -> bytes | None:
        if not line:
            event, self._data = b"\n".join(self._data), []
            return event or None
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        return None
