"""Blobs in a bucket of S3, Google or Azure, or of a server that speaks S3.

    PREFIX/blobs/NAME/00000 ...      published: pieces of PIECE bytes, the last one shorter
    PREFIX/incoming/NAME/00000 ...   staged pieces of something longer than one piece
    PREFIX/check                     written to see whether the bucket can be written

A blob is several plain objects rather than one multipart upload, because the parts of an upload that a crash cut off are listed
by no ordinary request: they could neither be found nor erased. Plain objects can, and each is whole or absent.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

from ropewalk.errors import MissingExtra, OutputError
from ropewalk.failpoints import failpoint
from ropewalk.files.blobs import safe

PIECE = 8 << 20  # part of the format: where a byte lies is computed from it
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_ENDPOINT")  # http:// there is what was meant
IN_FLIGHT = 2  # pieces of one upload on their way at a time; bounds its memory


class BucketBlobs:
    """Blobs in a bucket; addresses and credentials come from the environment variables that its maker documents."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise MissingExtra("obstore", "buckets", f"a bucket such as {url}") from error
        self.url = url
        self.client, self.failure = obstore, BaseError
        plain = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
        with self.asking():
            self.bucket = from_url(url, client_options={"allow_http": plain})
        self.workers = ThreadPoolExecutor(8, thread_name_prefix="bucket")

    def stage(self, name: str) -> BucketStaged:
        return BucketStaged(self, safe(name))

    def read(self, name: str, start: int, length: int) -> bytes:
        parts, at, end = [], start, start + length
        while at < end:
            offset = at % PIECE
            part = self._read_piece(name, at // PIECE, offset, min(end - at, PIECE - offset))
            parts.append(part)
            at += len(part)
            if not part or (at < end and at % PIECE):  # a piece that is not full is the last one
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, name: str) -> int:
        sizes = [size for _, size in self._pieces(f"blobs/{safe(name)}")]
        if not sizes:
            raise FileNotFoundError(name)
        return sum(sizes)

    def erase(self, name: str) -> None:
        self._erase_pieces(f"blobs/{safe(name)}")

    def names(self) -> Iterator[str]:
        return self._names("blobs")

    def staged(self) -> Iterator[str]:
        return self._names("incoming")

    def discard(self, name: str) -> None:
        self._erase_pieces(f"incoming/{safe(name)}")

    def check(self) -> None:
        self.put("check", b"")

    def put(self, path: str, data: bytes) -> None:
        with self.asking():
            self.client.put(self.bucket, path, data, use_multipart=False)

    def move(self, staged: str, name: str, pieces: int) -> None:
        """Copies all pieces within the bucket, then erases the staged ones."""

        def copy(number: int) -> None:
            with self.asking():
                self.client.copy(self.bucket, f"incoming/{staged}/{number:05d}", f"blobs/{name}/{number:05d}")
            failpoint("blob.copied")

        list(self.workers.map(copy, range(pieces)))
        self.discard(staged)

    @contextmanager
    def asking(self) -> Iterator[None]:
        try:
            yield
        except (self.failure, FileNotFoundError) as error:
            reason = str(error).partition("\n")[0]
            raise OutputError(f"the bucket {self.url} refused: {reason}; see its address and its credentials") from error

    def _read_piece(self, name: str, number: int, offset: int, length: int) -> bytes:
        try:
            return bytes(self.client.get_range(self.bucket, f"blobs/{safe(name)}/{number:05d}", start=offset, length=length))
        except (self.failure, FileNotFoundError) as error:
            if number * PIECE + offset >= self.size(name):  # asked for what lies beyond the end
                return b""
            with self.asking():
                raise error

    def _pieces(self, folder: str) -> Iterator[tuple[str, int]]:
        with self.asking():
            for batch in self.client.list(self.bucket, folder):
                yield from ((entry["path"], entry["size"]) for entry in batch)

    def _names(self, folder: str) -> Iterator[str]:
        last = None
        for path, _ in self._pieces(folder):
            name = path.split("/")[1]
            if name != last:
                yield name
            last = name

    def _erase_pieces(self, folder: str) -> None:
        paths = [path for path, _ in self._pieces(folder)]
        if paths:
            with self.asking():
                self.client.delete(self.bucket, paths)


class BucketStaged:
    """One blob being sent; what fits into one piece waits in memory and is published by a single request."""

    def __init__(self, blobs: BucketBlobs, name: str) -> None:
        self.blobs, self.name = blobs, name
        self.buffer, self.pieces, self.open = bytearray(), 0, True
        self.flying: deque[Future[None]] = deque()

    def write(self, data: bytes) -> None:
        assert self.open, "published or discarded"
        self.buffer += data
        while len(self.buffer) >= PIECE:
            piece = bytes(memoryview(self.buffer)[:PIECE])
            del self.buffer[:PIECE]
            self._send(piece)

    def publish(self, name: str) -> None:
        assert self.open, "published or discarded"
        if self.pieces:
            if self.buffer:
                self._send(bytes(self.buffer))
            while self.flying:
                self.flying.popleft().result()
            failpoint("blob.synced")
            self.blobs.move(self.name, safe(name), self.pieces)
        else:
            failpoint("blob.synced")
            self.blobs.put(f"blobs/{safe(name)}/00000", bytes(self.buffer))
        self.open = False
        self.buffer.clear()
        failpoint("blob.renamed")

    def discard(self) -> None:
        if not self.open:
            return
        self.open = False
        self.buffer.clear()
        for sent in self.flying:  # what arrives after the erasing would stay
            with suppress(OutputError):
                sent.result()
        if self.pieces:
            self.blobs.discard(self.name)

    def _send(self, piece: bytes) -> None:
        while len(self.flying) >= IN_FLIGHT:
            self.flying.popleft().result()
        self.flying.append(self.blobs.workers.submit(self.blobs.put, f"incoming/{self.name}/{self.pieces:05d}", piece))
        self.pieces += 1
