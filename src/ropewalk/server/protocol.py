"""HTTP/1.1 as uvicorn speaks it with httptools, with the two bounds that they lack: on the time and on the bytes of what is no body yet.

Without them a client without a key can hold connections open for ever by never ending a request's head, and can fill the memory by
a header, a trailer or a chunk extension that never ends, since httptools gathers each until it is complete.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ropewalk.server.wire import JSON, Failure, new_request_id

HEAD_SECONDS = 30.0  # from the connection, or the first byte of a request, to the end of its headers
HEAD_BYTES = 65_536  # that bring neither the end of the headers nor a byte of the body


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._waiting: asyncio.TimerHandle | None = None
        self._idle_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._idle_bytes += len(data)
        super().data_received(data)  # which sets it to zero if anything comes of them
        if self.transport.is_closing():
            return
        if self._idle_bytes > HEAD_BYTES:
            self._refuse()
        elif self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()

    def on_headers_complete(self) -> None:
        self._idle_bytes = 0
        self._wait_no_more()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        self._wait_no_more()  # from here uvicorn's own wait for the next request counts, until its first byte
        super().on_response_complete()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _refuse(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            request_id = new_request_id()
            shown = Failure(431, "invalid_request_error", f"The headers of this request have more than {HEAD_BYTES:,} bytes.")
            content = bytes(JSON(shown.body(request_id)).body)
            head = f"HTTP/1.1 431 Request Header Fields Too Large\r\nrequest-id: {request_id}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)
        self.transport.close()
