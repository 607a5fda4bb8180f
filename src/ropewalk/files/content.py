"""The bytes of a stored file: opened chunk by chunk, each verified before anybody sees it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ropewalk.errors import DamagedContent
from ropewalk.files.blobs import Blobs
from ropewalk.files.catalog import File
from ropewalk.vault import CHUNK, TAG, Opener, sealed_size


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
        ahead = asyncio.create_task(asyncio.to_thread(self._chunk, opener, first, whole))
        try:
            for index in range(first, last + 1):
                plain = await ahead
                if index < last:  # read while the reader is busy with this one
                    ahead = asyncio.create_task(asyncio.to_thread(self._chunk, opener, index + 1, whole))
                elif whole is not None and whole.hexdigest() != self.file.sha256:
                    raise DamagedContent(f"stored bytes are damaged: {self.name} does not have the SHA-256 that was stored")
                lower, upper = max(start - index * CHUNK, 0), min(end - index * CHUNK, CHUNK)
                if upper > lower:
                    yield plain if upper - lower == len(plain) else plain[lower:upper]
        finally:
            if not ahead.done():
                await asyncio.wait([ahead])
            if not ahead.cancelled():
                ahead.exception()  # of a read that nobody waits for any more

    async def read(self) -> bytes:
        """All of it."""
        return b"".join([chunk async for chunk in self.chunks()])

    def _chunk(self, opener: Opener, index: int, whole: hashlib._Hash | None) -> bytes:
        plain = self.chunk(opener, index)
        if whole is not None:
            whole.update(plain)
        return plain

    def chunk(self, opener: Opener, index: int) -> bytes:
        """One chunk's plain bytes; blocks."""
        final = (sealed_size(self.file.size) - 1) // (CHUNK + TAG)
        try:
            sealed = self.blobs.read(self.name, index * (CHUNK + TAG), CHUNK + TAG)
        except FileNotFoundError:
            raise DamagedContent(f"stored bytes are missing: {self.name}") from None
        return opener.open(sealed, index, index == final)
