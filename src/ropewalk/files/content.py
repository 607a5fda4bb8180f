"""The bytes of a stored file: opened chunk by chunk, each verified before anybody sees it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ropewalk.errors import DamagedContent
from ropewalk.files.blobs import Blobs
from ropewalk.files.catalog import File
from ropewalk.vault import CHUNK, TAG, Opener, sealed_size

Result = TypeVar("Result")


@dataclass(frozen=True)
class Content:
    """A file and the way to its bytes, as they were when it was opened."""

    file: File
    blobs: Blobs
    name: str
    key: bytes

    async def chunks(self, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The plain bytes from `start` to before `end`; a whole read is checked against the file's SHA-256 before its last chunk."""
        end = self.file.size if end is None else min(end, self.file.size)
        first, last = start // CHUNK, max(start, end - 1) // CHUNK
        whole = hashlib.sha256() if (start, end) == (0, self.file.size) else None
        opener = Opener(self.key, self.name)
        reading, hashing = _begun(self.chunk, opener, first), None
        try:
            for index in range(first, last + 1):
                plain = await reading
                if hashing is not None:
                    await hashing
                if index < last:  # read, and this one hashed, while whoever asked is busy with this one
                    reading = _begun(self.chunk, opener, index + 1)
                if whole is not None:
                    hashing = _begun(whole.update, plain)
                    if index == last:
                        await hashing
                        if whole.hexdigest() != self.file.sha256:
                            raise DamagedContent(
                                f"stored bytes are damaged: {self.name} does not have the SHA-256 that was stored"
                            )
                lower, upper = max(start - index * CHUNK, 0), min(end - index * CHUNK, CHUNK)
                if upper > lower:
                    yield plain if upper - lower == len(plain) else plain[lower:upper]
        finally:
            for begun in filter(None, (reading, hashing)):
                if not begun.done():
                    await asyncio.wait([begun])
                if not begun.cancelled():
                    begun.exception()  # of a read that nobody waits for any more

    async def read(self) -> bytes:
        """All of it."""
        return b"".join([chunk async for chunk in self.chunks()])

    def chunk(self, opener: Opener, index: int) -> bytes:
        """One chunk's plain bytes; blocks."""
        final = (sealed_size(self.file.size) - 1) // (CHUNK + TAG)
        try:
            sealed = self.blobs.read(self.name, index * (CHUNK + TAG), CHUNK + TAG)
        except FileNotFoundError:
            raise DamagedContent(f"stored bytes are missing: {self.name}") from None
        return opener.open(sealed, index, index == final)


def _begun(function: Callable[..., Result], *arguments: Any) -> asyncio.Task[Result]:
    """The function's work, begun in a thread."""
    return asyncio.create_task(asyncio.to_thread(function, *arguments))
