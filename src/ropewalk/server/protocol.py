"""HTTP/1.1 as uvicorn speaks it with httptools, with bounds that they lack: on the time and the bytes of what is no body, and on the
time of a body that is answered already.

Without them a client without a key can hold connections open for ever by never ending a request's head, and can fill the memory by
a header, a trailer or a chunk extension that never ends, since httptools gathers each until it is complete.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ropewalk.ids import new_id
from ropewalk.server.transport import Unlocked, unlocked
from ropewalk.server.wire import JSON, Failure

HEAD_SECONDS = 30.0  # from the connection, or the first byte of a request, to the end of its headers
HEAD_BYTES = 65_536  # that bring neither the end of the headers nor a byte of the body
DISCARD_SECONDS = 300.0  # for the rest of a body that was answered early: most clients look at the answer only then


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._waiting: asyncio.TimerHandle | None = None
        self._idle_bytes = 0
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(unlocked(transport))
        self._wait(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        if isinstance(self.transport, Unlocked):
            self.transport.lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._idle_bytes += len(data)
        super().data_received(data)  # which sets it to zero if anything comes of them
        if self.transport.is_closing():
            return
        if self._idle_bytes > HEAD_BYTES:
            self._refuse(431, f"The headers of this request have more than {HEAD_BYTES:,} bytes.")
        elif self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._wait(DISCARD_SECONDS if self._in_body else HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._idle_bytes, self._in_body = 0, True
        self._wait_no_more()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._wait_no_more()  # from here uvicorn's own wait for the next request counts, until its first byte
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "This is no HTTP/1.1 request, or not one that can be read.")

    def _wait(self, seconds: float) -> None:
        self._waiting = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _refuse(self, status: int, message: str) -> None:
        """Answers what never became a request of the application's, unless another answer is on its way, and ends the connection."""
        if self.cycle is None or self.cycle.response_complete:
            request_id = new_id("req")
            content = bytes(JSON(Failure(status, "invalid_request_error", message).body(request_id)).body)
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nrequest-id: {request_id}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)
        self.transport.close()
