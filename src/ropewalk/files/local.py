"""The file store of this machine for code that does not await: the command line, training, the quickstart.

Nothing here writes plain bytes: what is put is sealed on its way to the disk, and what is opened is unsealed chunk by chunk.
"""

from __future__ import annotations

import asyncio
import builtins
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from ropewalk.errors import NotFound
from ropewalk.files.catalog import File
from ropewalk.files.content import Content
from ropewalk.files.receipts import Receipt
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import DEFAULT
from ropewalk.vault import CHUNK, Opener

T = TypeVar("T")
Progress = Callable[[int], None]  # bytes taken since the last call
PAGE = 1000
NO_LIMIT = 1 << 62  # of one file's size: what a server takes from strangers is its own setting


granted: LocalFiles | None = None  # what another process has given this one, see granted.py


def open_local() -> LocalFiles:
    """This machine's files, as they lie in the default workspace; in a process that was given some, those."""
    return granted or LocalFiles()


def is_id(text: str) -> bool:
    """Whether a configuration's path is an id of the store."""
    return text.startswith("file_") and text[5:].isalnum()


class LocalFiles:
    """The files of one workspace. Every call opens the store anew, so that it may be used from any thread and any process."""

    def __init__(
        self,
        settings: Settings | None = None,
        workspace: str = DEFAULT,
        adapters_of: Callable[[str], Iterable[str]] = lambda file_id: (),
    ) -> None:
        self.settings = replace(settings or Settings(), max_file_bytes=NO_LIMIT)
        self.workspace, self.adapters_of = workspace, adapters_of

    def put(
        self,
        source: Path | bytes,
        filename: str | None = None,
        *,
        expires_in: int | None = None,
        tags: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> File:
        """Keeps these bytes and gives them an id; a path's own name is used if none is given."""
        if isinstance(source, bytes):
            if filename is None:
                raise ValueError("bytes need a filename")
            size = len(source)
        else:
            if not source.is_file():
                raise NotFound(f"there is no file '{source}'")
            size = source.stat().st_size
        name, tags = filename or Path(str(source)).name, tuple(tags)

        async def work(store: Store, caller: Caller) -> File:
            async with store.incoming(caller, size) as incoming:
                async for chunk in _chunks(source):
                    await incoming.write(chunk)
                    if progress:
                        progress(len(chunk))
                return await incoming.finish(name, expires_in=expires_in, tags=tags)

        return self.run(work)

    def show(self, id: str) -> File:
        """What is known about a file."""
        return self.run(lambda store, caller: store.show(caller, id))

    def list(self) -> builtins.list[File]:
        """All files, newest first."""

        async def work(store: Store, caller: Caller) -> builtins.list[File]:
            found: builtins.list[File] = []
            more = True
            while more:
                listing = await store.list(caller, PAGE, after=found[-1].place if found else None)
                found += listing.files
                more = listing.more
            return found

        return self.run(work)

    def open(self, id: str) -> BinaryIO:
        """The bytes of a file, to be read and sought in; each chunk is verified before any of it is seen."""

        async def work(store: Store, caller: Caller) -> SealedFile:
            return SealedFile(await store.open_content(caller, id))

        return cast(BinaryIO, io.BufferedReader(self.run(work), CHUNK))

    def delete(self, id: str) -> Receipt:
        """Erases a file and everything derived from it."""
        return self.run(lambda store, caller: store.delete(caller, id))

    def register_path(self, id: str, kind: str, *paths: Path) -> None:
        """Has files or folders made from a file erased with it; call it before they are made."""

        async def work(store: Store, _: Caller) -> None:
            for path in paths:
                await store.register_path(id, kind, path)

        self.run(work)

    def run(self, work: Callable[[Store, Caller], Awaitable[T]]) -> T:
        """Opens the store, does the work in the name of this machine's user, closes the store."""

        async def opened() -> T:
            store = await Store.open(self.settings)
            try:
                store.adapters_of = self.adapters_of
                return await work(store, await store.local_caller(self.workspace))
            finally:
                await store.close()

        if not _in_a_loop():
            return asyncio.run(opened())
        with ThreadPoolExecutor(1) as thread:  # this thread's loop must not run another
            return thread.submit(asyncio.run, opened()).result()


class SealedFile(io.RawIOBase):
    """The plain bytes of a stored file, unsealed as they are read."""

    def __init__(self, content: Content) -> None:
        self._content, self._opener = content, Opener(content.key, content.name)
        self._at, self._index, self._chunk = 0, -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._content.file.size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # no other buffer is ever given
        """Up to the end of the chunk that the place lies in."""
        if self._at >= self._content.file.size:
            return 0
        index, offset = divmod(self._at, CHUNK)
        if index != self._index:
            self._chunk, self._index = self._content.chunk(self._opener, index), index
        target = memoryview(buffer).cast("B")
        part = memoryview(self._chunk)[offset : offset + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _chunks(source: Path | bytes) -> AsyncIterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def old_files(folder: Path) -> str | None:
    """What to do about files that version 0.1 kept, unsealed and each with a JSON record; None where there are none."""
    records = folder / "files" / "files"
    if not records.is_dir() or not any(records.iterdir()):
        return None
    return (
        f"{folder / 'files'} also holds files of version 0.1, in the clear and unknown to this store: {records} says their names and "
        f"where in content/ their bytes lie; put those that are needed with `ropewalk files put`, then remove both folders"
    )
