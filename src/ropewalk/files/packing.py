"""Files of a folder as one sealed stream in the blob store, a tar, and back; blocking, so for a thread."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from ropewalk.errors import DamagedContent, OutputError
from ropewalk.failpoints import failpoint
from ropewalk.files.blobs import Blobs, Staged, open_blobs
from ropewalk.folders import make_folder
from ropewalk.vault import CHUNK, TAG, Opener, Sealer


@dataclass(frozen=True)
class Ticket:
    """Leave to write one archive, or to read it, and nothing else."""

    blobs: str  # where they are
    id: str  # its name there
    key: bytes
    size: int | None = None  # plain bytes; None: yet to be written


def pack(ticket: Ticket, folder: Path, paths: Sequence[str]) -> int:
    """Seals these files and folders of a folder into the blob store; how many plain bytes they took."""
    staged = open_blobs(ticket.blobs).stage(ticket.id)
    try:
        out = _Sealing(staged, Sealer(ticket.key, ticket.id))
        with tarfile.open(fileobj=cast(IO[bytes], out), mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for path in paths:
                tar.add(folder / path, arcname=path, filter=_plain)
        out.end()
        staged.publish(ticket.id)
        failpoint("archive.published")
    finally:
        staged.discard()
    return out.size


def unpack(ticket: Ticket, folder: Path) -> None:
    """Puts the files where they were in their folder; each is whole or not there, and so is each folder that is new."""
    make_folder(folder)
    source = _Opening(open_blobs(ticket.blobs), ticket)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as aside:
        try:
            with tarfile.open(fileobj=cast(IO[bytes], source), mode="r|") as tar:
                tar.extractall(aside, filter="data")
        except tarfile.TarError as error:
            raise DamagedContent(f"the archive {ticket.id} cannot be read: {error}") from error
        for path in Path(aside).rglob("*"):
            if path.is_file():
                _sync(path)
        _move(Path(aside), folder)


def check(ticket: Ticket) -> None:
    """Reads every byte; DamagedContent where one is not what was sealed."""
    source = _Opening(open_blobs(ticket.blobs), ticket)
    while source.read(CHUNK):
        pass


class _Sealing:
    """What a tar is written into."""

    def __init__(self, staged: Staged, sealer: Sealer) -> None:
        self._staged, self._sealer, self._waiting = staged, sealer, bytearray()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self._waiting += data
        # A chunk is sealed only when more is known to follow, since the last one is sealed as such.
        while len(self._waiting) > CHUNK:
            chunk = bytes(memoryview(self._waiting)[:CHUNK])
            del self._waiting[:CHUNK]
            self._staged.write(self._sealer.seal(chunk, False))
        return len(data)

    def end(self) -> None:
        self._staged.write(self._sealer.seal(bytes(self._waiting), True))


class _Opening:
    """What a tar is read from."""

    def __init__(self, blobs: Blobs, ticket: Ticket) -> None:
        assert ticket.size is not None, "an archive that is yet to be written"
        self._blobs, self._id, self._opener = blobs, ticket.id, Opener(ticket.key, ticket.id)
        self._count, self._next, self._waiting = max(1, -(-ticket.size // CHUNK)), 0, bytearray()

    def read(self, length: int) -> bytes:
        while len(self._waiting) < length and self._next < self._count:
            try:
                sealed = self._blobs.read(self._id, self._next * (CHUNK + TAG), CHUNK + TAG)
            except FileNotFoundError:
                raise DamagedContent(f"stored bytes are missing: {self._id}") from None
            self._waiting += self._opener.open(sealed, self._next, self._next == self._count - 1)
            self._next += 1
        found = bytes(memoryview(self._waiting)[:length])
        del self._waiting[:length]
        return found


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    if not member.isfile() and not member.isdir():
        raise OutputError(f"'{member.name}' is neither a file nor a folder, and cannot be kept in the store")
    return member.replace(uid=0, gid=0, uname="", gname="", deep=False)


def _move(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        there = target / path.name
        if path.is_dir() and there.is_dir():
            _move(path, there)
        else:
            if there.is_dir():
                shutil.rmtree(there)
            path.replace(there)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
