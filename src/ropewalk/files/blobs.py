"""Named bytes, durable once published: in a folder here, in a bucket in buckets.py.

    FOLDER/blobs/ab/abcd...      published: whole and on the disk, never changed, only erased
    FOLDER/incoming/NAME         staged: on their way, or left by a crash until the sweep

What the bytes mean, and who refers to them, is known to the database alone.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from ropewalk.errors import OutputError
from ropewalk.failpoints import failpoint
from ropewalk.folders import make_folder, sync_folder

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
WRITE_BEHIND = 16 << 20


class Staged(Protocol):
    """Bytes on their way in; nobody can read them before publish."""

    def write(self, data: bytes) -> None:
        """More of the bytes, in order."""

    def publish(self, name: str) -> None:
        """All bytes under their final name; durable when it returns."""

    def discard(self) -> None:
        """Gives up and leaves nothing; does nothing when called again or once published."""


class Blobs(Protocol):
    """A place for named bytes; its methods block, so call them in threads."""

    def stage(self, name: str) -> Staged:
        """Begins new bytes under a name of their own."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """Exactly this range, shorter only where the bytes end; FileNotFoundError if there is no such name."""

    def size(self, name: str) -> int:
        """How many bytes; FileNotFoundError if there is no such name."""

    def erase(self, name: str) -> None:
        """Published bytes are gone for good when it returns, or were gone before."""

    def names(self) -> Iterator[str]:
        """Every published name."""

    def staged(self) -> Iterator[str]:
        """Every staged name: in flight, or left by a crash."""

    def discard(self, name: str) -> None:
        """Staged bytes of that name are gone when it returns, or were gone before."""

    def check(self) -> None:
        """Raises OutputError unless bytes can be written now."""


def open_blobs(url: str | Path) -> Blobs:
    """The blobs of a folder, or of a bucket: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://ACCOUNT/CONTAINER/PREFIX."""
    if "://" not in str(url):
        return LocalBlobs(Path(url))
    from ropewalk.files.buckets import BucketBlobs

    return BucketBlobs(str(url))


def safe(name: str) -> str:
    """The name itself, if it can be a file's and a bucket key's name; all names are made by us."""
    assert NAME.fullmatch(name), f"no name for a blob: {name!r}"
    return name


class LocalBlobs:
    """Blobs in a folder; several processes may use it at once."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._shards: set[Path] = set()
        with _writing(self.folder):
            for inner in (self.folder / "blobs", self.folder / "incoming"):
                make_folder(inner)

    def stage(self, name: str) -> LocalStaged:
        return LocalStaged(self, self.folder / "incoming" / safe(name))

    def read(self, name: str, start: int, length: int) -> bytes:
        handle = os.open(self._path(name), os.O_RDONLY)
        try:
            data = os.pread(handle, length, start)
            while len(data) < length and (more := os.pread(handle, length - len(data), start + len(data))):
                data += more
            return data
        finally:
            os.close(handle)

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def erase(self, name: str) -> None:
        path = self._path(name)
        with _writing(self.folder), suppress(FileNotFoundError):
            with suppress(FileNotFoundError):
                path.unlink()
            sync_folder(path.parent)  # also when the file was gone: whoever unlinked it may have died before this

    def names(self) -> Iterator[str]:
        for shard in os.scandir(self.folder / "blobs"):
            for entry in os.scandir(shard):
                yield entry.name

    def staged(self) -> Iterator[str]:
        for entry in os.scandir(self.folder / "incoming"):
            if NAME.fullmatch(entry.name):
                yield entry.name

    def discard(self, name: str) -> None:
        with _writing(self.folder), suppress(FileNotFoundError):
            (self.folder / "incoming" / safe(name)).unlink()

    def check(self) -> None:
        probe = self.folder / "incoming" / f".check-{secrets.token_hex(8)}"
        with _writing(self.folder):
            try:
                probe.write_bytes(b"x")
            finally:
                probe.unlink(missing_ok=True)

    def place(self, name: str) -> Path:
        """The path of a name to be published; its folder exists and is itself on the disk."""
        path = self._path(name)
        if path.parent not in self._shards:  # synced once by each process: another may have made it and not yet synced it
            make_folder(path.parent)
            self._shards.add(path.parent)
        return path

    def _path(self, name: str) -> Path:
        return self.folder / "blobs" / safe(name)[:2] / name


class LocalStaged:
    """One file being written in the incoming folder."""

    def __init__(self, blobs: LocalBlobs, path: Path) -> None:
        self.blobs, self.path, self.written, self.pushed = blobs, path, 0, 0
        with _writing(blobs.folder):
            self.handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, data: bytes) -> None:
        assert self.handle is not None, "published or discarded"
        rest = memoryview(data)
        with _writing(self.blobs.folder):
            while rest:
                done = os.write(self.handle, rest)
                rest, self.written = rest[done:], self.written + done
        if self.written - self.pushed >= WRITE_BEHIND:
            self._push()

    def publish(self, name: str) -> None:
        assert self.handle is not None, "published or discarded"
        with _writing(self.blobs.folder):
            os.fsync(self.handle)
            failpoint("blob.synced")
            path = self.blobs.place(name)
            os.rename(self.path, path)
            self._close()
            failpoint("blob.renamed")
            sync_folder(path.parent)

    def discard(self) -> None:
        if self.handle is not None:
            self._close()
            self.blobs.discard(self.path.name)

    def _push(self) -> None:
        """Sends what was written on its way to the disk, so that little is left to wait for at the end."""
        assert self.handle is not None
        if hasattr(os, "posix_fadvise"):  # Linux starts to write dirty pages out when told that they are not needed
            os.posix_fadvise(self.handle, self.pushed, self.written - self.pushed, os.POSIX_FADV_DONTNEED)
        self.pushed = self.written

    def _close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write in {folder}: {error.strerror or error}; free space or permit it, or name another place"
        ) from error
