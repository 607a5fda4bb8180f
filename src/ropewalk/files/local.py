"""Bytes in, an id out: files kept by the digest of their content.

    FOLDER/content/ab/abcdef...      the bytes, named by their SHA-256; equal bytes are kept once
    FOLDER/files/file_....json       one record per file put; several records may share one content

Everything is written beside its place, fsynced and renamed, so that a crash leaves a file whole or absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ropewalk.errors import NotFound, OutputError

CHUNK = 1 << 20


def home() -> Path:
    """Where Ropewalk keeps its own state: $ROPEWALK_HOME, else ~/.ropewalk."""
    return Path(os.environ.get("ROPEWALK_HOME") or Path.home() / ".ropewalk").expanduser()


def open_store() -> Store:
    """This machine's store."""
    return Store(home() / "files")


def resolve(path_or_id: Path | str) -> Path:
    """The path itself, or the content of the file whose id it is."""
    return open_store().get(str(path_or_id)) if is_id(str(path_or_id)) else Path(path_or_id)


def is_id(text: str) -> bool:
    """Whether a configuration's path is an id of this store."""
    return text.startswith("file_") and text[5:].isalnum()


@dataclass(frozen=True)
class File:
    """What is known about a file: its id, its name at the time it was put, its size, digest and hour."""

    id: str
    filename: str
    size: int
    sha256: str
    created: str


class Store:
    """A folder of files; several processes may use it at once."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def put(self, source: Path | bytes, filename: str | None = None) -> File:
        """Keep these bytes and give them an id; a path's own name is used if none is given."""
        if isinstance(source, Path) and not source.is_file():
            raise NotFound(f"there is no file '{source}'")
        if isinstance(source, bytes) and filename is None:
            raise ValueError("bytes need a filename")
        name = filename or Path(str(source)).name
        try:
            return self._put(source, name)
        except OSError as error:
            raise OutputError(
                f"cannot keep '{name}' in {self.folder}: {error.strerror or error}; free space or set ROPEWALK_HOME"
            ) from error

    def show(self, id: str) -> File:
        """The record of one file."""
        try:
            return File(**json.loads(self._record(id).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise NotFound(f"no file '{id}' in {self.folder}; `ropewalk files list` names the ids") from None

    def get(self, id: str) -> Path:
        """Where the bytes lie; read only."""
        return self._content(self.show(id).sha256)

    def list(self) -> list[File]:
        """All files, oldest first."""
        found = []
        for path in (self.folder / "files").glob("file_*.json"):
            with suppress(NotFound):  # deleted by another process since it was listed
                found.append(self.show(path.stem))
        return sorted(found, key=lambda file: (file.created, file.id))

    def delete(self, id: str) -> None:
        """Forget the file, and erase its bytes when no other file shares them."""
        file = self.show(id)
        with self._locked(fcntl.LOCK_EX):  # nobody may put the same bytes between the look and the erasing
            self._record(id).unlink(missing_ok=True)
            if all(other.sha256 != file.sha256 for other in self.list()):
                self._content(file.sha256).unlink(missing_ok=True)

    def _put(self, source: Path | bytes, name: str) -> File:
        with _Incoming(self.folder) as content, _Incoming(self.folder) as record:
            sha256, size = content.write(_chunks(source))
            file = File(f"file_{secrets.token_hex(12)}", name, size, sha256, datetime.now(UTC).isoformat(timespec="seconds"))
            record.write([json.dumps(asdict(file), indent=2).encode()])
            with self._locked(fcntl.LOCK_SH):
                content.place(self._content(sha256))
                record.place(self._record(file.id))
        return file

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, how)
            yield

    def _content(self, sha256: str) -> Path:
        return self.folder / "content" / sha256[:2] / sha256

    def _record(self, id: str) -> Path:
        if not is_id(id):
            raise NotFound(f"'{id}' is no id of a file; `ropewalk files list` names the ids")
        return self.folder / "files" / f"{id}.json"


class _Incoming:
    """A new file on its way: written aside, its bytes on the disk before it is renamed to its place; gone if it never gets there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=folder, prefix=".new-")
        self.out, self.path = os.fdopen(handle, "wb"), Path(path)

    def __enter__(self) -> _Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self.out.close()
        self.path.unlink(missing_ok=True)

    def write(self, chunks: Iterable[bytes]) -> tuple[str, int]:
        """All the bytes -> their digest and their number."""
        digest, size = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            size += self.out.write(chunk)
        self.out.flush()
        os.fsync(self.out.fileno())
        return digest.hexdigest(), size

    def place(self, place: Path) -> None:
        """Rename to the place and put the new name on the disk too."""
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, place)
        directory = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
