"""The parts of an upload that comes in several requests: each sealed under its own name, on the disk before it is counted."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import now
from ropewalk.errors import DamagedContent, NotFound, ResumeFailed
from ropewalk.failpoints import failpoint
from ropewalk.files.blobs import Staged
from ropewalk.files.store import Store
from ropewalk.files.tables import erasures, parts, resumables
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.vault import CHUNK, TAG, Opener, Sealer, sealed_size, unwrap

LIFE = 24 * 3600 * 1_000_000  # of an upload, after the last byte that came


@dataclass(frozen=True)
class Resumable:
    """One upload and how far it has come."""

    id: str
    organization_id: str
    workspace_id: str
    user_id: str | None
    key_id: str | None
    filename: str | None
    mime_type: str | None
    expires_in: int | None
    tags: Sequence[str]
    length: int
    received: int
    reserved: bool
    sealed_key: bytes | None
    created_at: int
    expires_at: int
    file_id: str | None

    @property
    def owner(self) -> Caller:
        """Who created it: the file is theirs, and counts against their quotas."""
        return Caller(self.organization_id, self.workspace_id, self.key_id, self.user_id)


class Part:
    """Bytes of one request on their way; made by `begin`."""

    def __init__(self, store: Store, upload: Resumable, sealer: Sealer, name: str, staged: Staged) -> None:
        self._store, self._upload, self._sealer, self._staged = store, upload, sealer, staged
        self.name, self.size = name, 0
        self._waiting = bytearray()
        self._done = False

    @classmethod
    async def begin(cls, store: Store, upload: Resumable) -> Part:
        """Writes the name down, so that the sweep knows it, and stages it."""
        name = secrets.token_hex(16)
        async with store.database.writing() as connection:
            key = await _key(store, connection, upload)
            row = {"name": name, "resumable_id": upload.id, "start": upload.received, "size": None}
            await connection.execute(insert(parts).values(row))
        staged = await asyncio.to_thread(store.blobs.stage, name)
        return cls(store, upload, Sealer(key, name), name, staged)

    async def write(self, piece: bytes) -> None:
        self.size += len(piece)
        self._waiting += piece
        # A chunk is sealed only when more is known to follow, since the last one is sealed as such.
        while len(self._waiting) > CHUNK:
            chunk = bytes(memoryview(self._waiting)[:CHUNK])
            del self._waiting[:CHUNK]
            await asyncio.to_thread(self._write, chunk, False)

    async def publish(self) -> Resumable:
        """Durable, then counted; late if others have counted theirs for the same place."""
        await asyncio.to_thread(self._write, bytes(self._waiting), True)
        await asyncio.to_thread(self._staged.publish, self.name)
        failpoint("resumable.published")
        upload, end = self._upload, self._upload.received + self.size
        at = (resumables.c.id == upload.id, resumables.c.received == upload.received, resumables.c.file_id.is_(None))
        async with self._store.database.writing() as connection:
            counted = await connection.execute(update(resumables).where(*at).values(received=end, expires_at=now() + LIFE))
            if counted.rowcount:
                await connection.execute(update(parts).where(parts.c.name == self.name).values(size=self.size))
                row = (await connection.execute(select(resumables).where(resumables.c.id == upload.id))).one()
        if not counted.rowcount:
            raise late(upload, upload.received)
        self._done = True
        failpoint("resumable.committed")
        return as_resumable(row)

    async def discard(self) -> None:
        """Leaves nothing, unless it was published and counted."""
        if self._done:
            return
        self._done = True
        await asyncio.to_thread(self._staged.discard)
        async with self._store.database.writing() as connection:
            row = (await connection.execute(select(parts.c.size).where(parts.c.name == self.name))).first()
            if row is not None and row.size is not None:
                return  # it was counted, although the transaction seemed to fail
            await connection.execute(delete(parts).where(parts.c.name == self.name))
            name = self._store.database.upsert(erasures).values(place="blobs", stored=self.name)
            await connection.execute(name.on_conflict_do_nothing())
        await self._store.erase([("blobs", self.name)])

    def _write(self, plain: bytes, last: bool) -> None:
        self._staged.write(self._sealer.seal(plain, last))


async def contents(store: Store, upload: Resumable) -> AsyncIterator[bytes]:
    """The plain bytes of all parts, in order."""
    async with store.database.reading() as connection:
        key = await _key(store, connection, upload)
        of = (parts.c.resumable_id == upload.id, parts.c.size.is_not(None))
        rows = (await connection.execute(select(parts).where(*of).order_by(parts.c.start))).all()
    for row in rows:
        opener = Opener(key, row.name)
        count = sealed_size(row.size) - row.size
        for index in range(count // TAG):
            yield await asyncio.to_thread(_open, store, opener, row.name, index, (index + 1) * TAG == count)


def _open(store: Store, opener: Opener, name: str, index: int, last: bool) -> bytes:
    try:
        return opener.open(store.blobs.read(name, index * (CHUNK + TAG), CHUNK + TAG), index, last)
    except FileNotFoundError:
        raise DamagedContent(f"stored bytes are missing: {name}") from None


async def _key(store: Store, connection: AsyncConnection, upload: Resumable) -> bytes:
    """The key under which its parts are sealed."""
    if upload.sealed_key is None:
        raise missing(upload.id)
    outer = await workspace_key(connection, store.vault, upload.workspace_id)
    return unwrap(outer, upload.sealed_key, f"resumable {upload.id}")


def as_resumable(row: Any) -> Resumable:
    return Resumable(**{field.name: getattr(row, field.name) for field in fields(Resumable)})


def missing(id: str) -> NotFound:
    """The same for an id that never was, that is over, and that is another's."""
    return NotFound(f"Upload `{id}` not found.")


def late(upload: Resumable, offset: int) -> ResumeFailed:
    return ResumeFailed(
        f"upload `{upload.id}` does not go on at byte {offset:,}: ask for its Upload-Offset, and send from there", 409
    )
