"""Bytes in, an id out: files kept by the digest of their content.

    FOLDER/content/ab/abcdef...      the bytes, named by their SHA-256; equal bytes are kept once
    FOLDER/files/file_....json       one record per file put; several records may share one content

Everything is written beside its place, fsynced and renamed, so that a crash leaves a file whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

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
    """A folder of files."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def put(self, source: Path | bytes, filename: str | None = None) -> File:
        """Keep these bytes and give them an id; a path's own name is used if none is given."""
        if isinstance(source, bytes) and filename is None:
            raise ValueError("bytes need a filename")
        name = filename or Path(str(source)).name
        try:
            sha256, size = self._keep(source)
            file = File(f"file_{secrets.token_hex(12)}", name, size, sha256, datetime.now(UTC).isoformat(timespec="seconds"))
            with _whole(self._record(file.id)) as out:
                out.write(json.dumps(asdict(file), indent=2).encode())
        except OSError as error:
            raise OutputError(
                f"cannot keep '{name}' in {self.folder}: {error.strerror or error}; free space or set ROPEWALK_HOME"
            ) from error
        return file

    def show(self, id: str) -> File:
        """The record of one file."""
        if not is_id(id) or not self._record(id).exists():
            raise NotFound(f"no file '{id}' in {self.folder}; `ropewalk files list` names the ids")
        return File(**json.loads(self._record(id).read_text(encoding="utf-8")))

    def get(self, id: str) -> Path:
        """Where the bytes lie; read only."""
        return self._content(self.show(id).sha256)

    def list(self) -> list[File]:
        """All files, oldest first."""
        return sorted(
            (self.show(path.stem) for path in (self.folder / "files").glob("file_*.json")), key=lambda f: (f.created, f.id)
        )

    def delete(self, id: str) -> None:
        """Forget the file, and erase its bytes when no other file shares them."""
        file = self.show(id)
        self._record(id).unlink()
        if all(other.sha256 != file.sha256 for other in self.list()):
            self._content(file.sha256).unlink()

    def _keep(self, source: Path | bytes) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        for chunk in _chunks(source):
            digest.update(chunk)
            size += len(chunk)
        place = self._content(digest.hexdigest())
        if not place.exists():
            with _whole(place) as out:
                for chunk in _chunks(source):
                    out.write(chunk)
        return digest.hexdigest(), size

    def _content(self, sha256: str) -> Path:
        return self.folder / "content" / sha256[:2] / sha256

    def _record(self, id: str) -> Path:
        return self.folder / "files" / f"{id}.json"


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


@contextmanager
def _whole(place: Path) -> Iterator[IO[bytes]]:
    """A new file that appears at its place whole, after its bytes are on the disk, or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
