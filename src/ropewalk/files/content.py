"""The bytes of a stored file: opened chunk by chunk, each verified before anybody sees it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ropewalk.errors import DamagedContent
from ropewalk.files.blobs import Blobs
from ropewalk.files.catalog import File
from ropewalk.vault import CHUNK, TAG, Opener, sealed_size

BATCH = 4  # chunks
AHEAD = 32  # chunks that all reads together may have read ahead


@dataclass(frozen=True)
class Content:
    """A file and the way to its bytes, as they were when it was opened."""

    file: File
    blobs: Blobs
    name: str
    key: bytes

    async def chunks(self, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """The plain bytes from `start` to before `end`; a whole read is checked against the file's SHA-256 before its last chunk."""
        end = self.file.size if end is None else min(end, self.file.size)
        first, last = start // CHUNK, max(start, end - 1) // CHUNK
        whole = hashlib.sha256() if (start, end) == (0, self.file.size) else None
        opener = Opener(self.key, self.name)
        _under_way.add(opener)
        ahead = self._begin(opener, first, 1, whole)
        try:
            while first <= last:
                batch, index = await ahead, first
                first += len(batch)
                if first <= last:  # read while the reader is busy with this one
                    ahead = self._begin(opener, first, min(_batch(), last + 1 - first), whole)
                elif whole is not None and whole.hexdigest() != self.file.sha256:
                    raise DamagedContent(f"stored bytes are damaged: {self.name} does not have the SHA-256 that was stored")
                for plain in batch:
                    lower, upper = max(start - index * CHUNK, 0), min(end - index * CHUNK, CHUNK)
                    if upper > lower:
                        yield plain if upper - lower == len(plain) else plain[lower:upper]
                    index += 1
        finally:
            _under_way.discard(opener)
            if not ahead.done():
                await asyncio.wait([ahead])
            if not ahead.cancelled():
                ahead.exception()  # of a read that nobody waits for any more

    async def read(self) -> bytes:
        """All of it."""
        return b"".join([chunk async for chunk in self.chunks()])

    def chunk(self, opener: Opener, index: int) -> bytes:
        """One chunk's plain bytes; blocks."""
        return self._read(opener, index, 1, None)[0]

    def _begin(self, opener: Opener, first: int, count: int, whole: hashlib._Hash | None) -> asyncio.Future[list[bytes]]:
        """In a thread, and at once: a task would begin only when whoever reads has nothing to do."""
        return asyncio.get_running_loop().run_in_executor(None, self._read, opener, first, count, whole)

    def _read(self, opener: Opener, first: int, count: int, whole: hashlib._Hash | None) -> list[bytes]:
        final, sealed = (sealed_size(self.file.size) - 1) // (CHUNK + TAG), CHUNK + TAG
        try:
            found = memoryview(self.blobs.read(self.name, first * sealed, count * sealed))
        except FileNotFoundError:
            raise DamagedContent(f"stored bytes are missing: {self.name}") from None
        opened = []
        for index in range(first, first + count):
            place = (index - first) * sealed
            opened.append(opener.open(found[place : place + sealed], index, index == final))
            if whole is not None:
                whole.update(opened[-1])
        return opened


_under_way: set[Opener] = set()  # one of each read of this process


def _batch() -> int:
    """How many chunks to read at once: several, since each turn of a thread costs as much as reading one; fewer where many read."""
    return max(1, min(BATCH, AHEAD // len(_under_way)))
