"""Events as they come, as text/event-stream: whatever the shape, with signs of life while nothing comes, and ended with its client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Generic, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ropewalk.server import logs

T = TypeVar("T")

PING_SECONDS = 10.0  # without a word from the model, a stream says that it is still there
FIRST_SECONDS = 5.0  # so long an error can still be the answer's status; then the stream begins


class Streamed(StreamingResponse, Generic[T]):
    """An answer in events."""

    def __init__(
        self,
        events: AsyncGenerator[T, None],
        write: Callable[[T], Iterable[bytes]],
        failed: Callable[[BaseException], bytes],
        request_id: str,
        *,
        ping: bytes = b": still there\n\n",
        last: bytes = b"",
    ) -> None:
        """`write` says what is sent of an event, `failed` of an error, `last` at the end."""
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._sent(), 200, headers, "text/event-stream")
        self._events, self._write, self._failed, self._request_id = events, write, failed, request_id
        self._ping, self._last = ping, last
        self._next = asyncio.ensure_future(anext(events))

    async def begin(self) -> T | None:
        """Waits for the first event, but not long, and shows it; raises what keeps it from coming."""
        await asyncio.wait({self._next}, timeout=FIRST_SECONDS)
        return self._next.result() if self._next.done() else None

    async def leave(self) -> None:
        """Ends the events, wherever they are."""
        self._next.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
            await self._next
        await self._events.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.leave()

    async def _sent(self) -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.wait({self._next}, timeout=PING_SECONDS)
                if not self._next.done():
                    yield self._ping
                    continue
                try:
                    event = self._next.result()
                except StopAsyncIteration:
                    break
                for part in self._write(event):
                    yield part
                self._next = asyncio.ensure_future(anext(self._events))
            if self._last:
                yield self._last
        except Exception as error:  # the status has been sent: the error is an event
            logs.event("stream_failed", logging.ERROR, error, request_id=self._request_id)
            yield self._failed(error)
