"""A connection whose large writes do not hold the interpreter's lock.

uvloop copies what it writes into the kernel with the lock held: while a megabyte goes out, the thread that reads and verifies the
next one stands still, and a download takes half as long again.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any, cast

LARGE = 1 << 16  # from here on the copy takes longer than a system call of our own


class Unlocked:
    """A transport that tries to write large pieces at once by itself, and leaves what the socket does not take to the loop."""

    def __init__(self, transport: asyncio.Transport, handle: int) -> None:
        self._transport, self._handle = transport, handle
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | memoryview) -> None:
        # What waits goes first; and a handle that is closed may be another connection's by now.
        if len(data) >= LARGE and not (self._lost or self._transport.is_closing() or self._transport.get_write_buffer_size()):
            with suppress(OSError):  # full, or broken: the loop waits for the one and reports the other
                data = memoryview(data)[os.write(self._handle, data) :]
        if data:
            self._transport.write(data)

    def lost(self) -> None:
        """The loop is about to close the handle."""
        self._lost = True


def unlocked(transport: asyncio.Transport) -> asyncio.Transport:
    """The transport with large writes of its own; as it is where the bytes are encrypted on their way."""
    if transport.get_extra_info("sslcontext") is not None or transport.get_extra_info("socket") is None:
        return transport
    return cast(asyncio.Transport, Unlocked(transport, transport.get_extra_info("socket").fileno()))
