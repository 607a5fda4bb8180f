"""Uploads in several requests: what has been acknowledged is on the disk, and the last byte makes the file.

create     quota for the whole length, a key of its own          one transaction
append     written down, sealed and published part by part,      a transaction before and after each part
           then counted: who asks sees only what is durable
finish     the parts go through an upload like any other         the upload's own transactions; the last also ends the parts

Two requests may append at once: both bring bytes, and the first to be durable counts; the other is told that it is late.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import now
from ropewalk.errors import DamagedContent, NotFound, QuotaExceeded, ResumeFailed, TooLarge
from ropewalk.failpoints import failpoint
from ropewalk.files import catalog
from ropewalk.files.blobs import Staged
from ropewalk.files.catalog import File
from ropewalk.files.incoming import Incoming
from ropewalk.files.names import stored_name
from ropewalk.files.store import Store
from ropewalk.files.tables import erasures, parts, resumables
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.vault import CHUNK, TAG, Opener, Sealer, new_key, sealed_size, unwrap, wrap

LIFE = 24 * 3600 * 1_000_000  # after the last byte that came
PART = 64 << 20  # bytes of one request that become durable together, unless a checksum is to be awaited
ALGORITHMS = ("sha256", "sha1")

Checksum: TypeAlias = tuple[str, bytes]  # one of ALGORITHMS, and the digest

_finishing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()


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


async def create(
    store: Store,
    caller: Caller,
    length: int,
    filename: str | None,
    mime_type: str | None = None,
    *,
    expires_in: int | None = None,
    tags: Sequence[str] = (),
) -> Resumable:
    """An upload of so many bytes, for which there is room."""
    caller.needs("write")
    if length > store.max_file_bytes:
        raise TooLarge(f"the file is larger than {store.max_file_bytes:,} bytes, the most that a file may have here")
    stored_name(filename, "")  # a name that cannot be kept is told before the bytes come
    id, moment = catalog.new_id("upload_"), now()
    async with store.database.reading() as connection:
        sealed = wrap(await workspace_key(connection, store.vault, caller.workspace_id), new_key(), f"resumable {id}")
    upload = Resumable(
        id=id,
        organization_id=caller.organization_id,
        workspace_id=caller.workspace_id,
        user_id=caller.user_id,
        key_id=caller.key_id,
        filename=filename,
        mime_type=mime_type,
        expires_in=expires_in,
        tags=list(tags),
        length=length,
        received=0,
        reserved=True,
        sealed_key=sealed,
        created_at=moment,
        expires_at=moment + LIFE,
        file_id=None,
    )
    try:
        await _begin(store, upload)
    except QuotaExceeded:
        from ropewalk.files.lifecycle import expire as expire_files  # its sweep calls this module

        await expire_files(store)  # what has expired takes no room, whether or not the sweep has been there
        await expire(store)
        await _begin(store, upload)
    return upload


async def show(store: Store, caller: Caller, id: str) -> Resumable:
    """How far an upload has come; NotFound also for another's, and for one whose time is over."""
    caller.needs("write")
    async with store.database.reading() as connection:
        return await _find(connection, caller, id)


async def append(
    store: Store, caller: Caller, id: str, offset: int, pieces: AsyncIterator[bytes], checksum: Checksum | None = None
) -> Resumable:
    """Adds the bytes from `offset` on. If they stop coming, those that came are kept, unless a checksum says what they must be."""
    upload = await show(store, caller, id)
    if offset != upload.received or upload.file_id is not None:
        raise _late(upload, offset)
    digest = hashlib.new(checksum[0]) if checksum else None
    part: _Part | None = None
    try:
        try:
            async for piece in pieces:
                if upload.received + (part.size if part else 0) + len(piece) > upload.length:
                    raise TooLarge(f"upload `{id}` was announced with {upload.length:,} bytes, and more than that came")
                if part is None:
                    part = await _Part.begin(store, upload)
                await part.write(piece)
                if digest:
                    digest.update(piece)
                elif part.size >= PART:
                    upload, part = await part.publish(), None
        except Exception:
            if part and not digest:
                await part.publish()
            raise
        if checksum and digest and digest.digest() != checksum[1]:
            raise ResumeFailed(f"the {checksum[0]} of these bytes is not the one that was sent with them: send them again", 460)
        if part:
            upload = await part.publish()
    finally:
        if part:
            await asyncio.shield(part.discard())
    return upload


async def finish(store: Store, upload: Resumable, request_id: str = "") -> Resumable:
    """With every byte there, the file is made, once; what is not yet whole stays as it is."""
    if upload.received < upload.length or upload.file_id is not None:
        return upload
    async with _finishing.setdefault(upload.id, asyncio.Lock()):
        upload = await show(store, upload.owner, upload.id)
        if upload.file_id is None:
            try:
                assembly = _Assembly(store, upload, request_id)
                async with assembly:
                    async for plain in _contents(store, upload):
                        await assembly.write(plain)
                    await assembly.finish(upload.filename, upload.mime_type, expires_in=upload.expires_in, tags=upload.tags)
                await store.erase(assembly.doomed)
            except _Finished:  # by another process, meanwhile
                pass
        return await show(store, upload.owner, upload.id)


async def terminate(store: Store, caller: Caller, id: str) -> None:
    """Ends an upload: what came is erased, what was set aside is given back. A file that it has become stays."""
    caller.needs("write")
    async with store.database.writing() as connection:
        upload = await _find(connection, caller, id, lock=True)
        doomed = await _end(store, connection, upload)
    await store.erase(doomed)


async def expire(store: Store) -> int:
    """Ends the uploads whose time is over."""
    count = 0
    over = select(resumables).where(resumables.c.expires_at <= now()).limit(1)
    while True:
        async with store.database.reading() as connection:
            if (await connection.execute(over)).first() is None:
                return count
        async with store.database.writing() as connection:
            row = (await connection.execute(over.with_for_update(skip_locked=True))).first()
            if row is None:
                return count
            doomed = await _end(store, connection, _upload(row))
        await store.erase(doomed)
        count += 1


class _Part:
    """Bytes of one request on their way; made by `begin`."""

    def __init__(self, store: Store, upload: Resumable, sealer: Sealer, name: str, staged: Staged) -> None:
        self._store, self._upload, self._sealer, self._staged = store, upload, sealer, staged
        self.name, self.size = name, 0
        self._waiting = bytearray()
        self._done = False

    @classmethod
    async def begin(cls, store: Store, upload: Resumable) -> _Part:
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
            raise _late(upload, upload.received)
        self._done = True
        failpoint("resumable.committed")
        return _upload(row)

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


class _Assembly(Incoming):
    """The upload through which the parts become a file: it takes over their reservation, and ends them as it is committed."""

    def __init__(self, store: Store, upload: Resumable, request_id: str) -> None:
        super().__init__(store, upload.owner, upload.length, request_id)
        self._upload = upload
        self.doomed: list[tuple[str, str]] = []

    async def _set_aside(self, connection: AsyncConnection) -> None:
        held = (resumables.c.id == self._upload.id, resumables.c.reserved.is_(True), resumables.c.file_id.is_(None))
        if not (await connection.execute(update(resumables).where(*held).values(reserved=False))).rowcount:
            await super()._set_aside(connection)  # an earlier attempt was cut short, and its reservation given back

    async def _record(self, connection: AsyncConnection, *arguments: Any) -> File:
        mine = resumables.c.id == self._upload.id
        row = (await connection.execute(select(resumables.c.file_id).where(mine).with_for_update())).first()
        if row is None:
            raise _missing(self._upload.id)
        if row.file_id is not None:
            raise _Finished
        file = await super()._record(connection, *arguments)
        self.doomed = await _forget_parts(self._store, connection, self._upload.id)
        await connection.execute(update(resumables).where(mine).values(file_id=file.id, sealed_key=None))
        return file


class _Finished(Exception):
    """Another process has made the file."""


async def _begin(store: Store, upload: Resumable) -> None:
    async with store.database.writing() as connection:
        await connection.execute(insert(resumables).values({f.name: getattr(upload, f.name) for f in fields(Resumable)}))
        await quotas.reserve(connection, upload.owner, upload.length)


async def _find(connection: AsyncConnection, caller: Caller, id: str, *, lock: bool = False) -> Resumable:
    query = select(resumables).where(
        resumables.c.id == id, resumables.c.workspace_id == caller.workspace_id, resumables.c.expires_at > now()
    )
    if caller.user_id is not None:
        query = query.where(resumables.c.user_id == caller.user_id)
    row = (await connection.execute(query.with_for_update() if lock else query)).first()
    if row is None:
        raise _missing(id)
    return _upload(row)


async def _end(store: Store, connection: AsyncConnection, upload: Resumable) -> list[tuple[str, str]]:
    """Forgets an upload; what is to be erased after the commit."""
    doomed = await _forget_parts(store, connection, upload.id)
    await connection.execute(delete(resumables).where(resumables.c.id == upload.id))
    if upload.reserved:
        await quotas.release(connection, upload.owner, upload.length, reserved=True)
    return doomed


async def _forget_parts(store: Store, connection: AsyncConnection, id: str) -> list[tuple[str, str]]:
    gone = await connection.execute(delete(parts).where(parts.c.resumable_id == id).returning(parts.c.name))
    doomed = [("blobs", name) for name in gone.scalars()]
    if doomed:
        rows = [{"place": place, "stored": stored} for place, stored in doomed]
        await connection.execute(store.database.upsert(erasures).on_conflict_do_nothing(), rows)
    return doomed


async def _contents(store: Store, upload: Resumable) -> AsyncIterator[bytes]:
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
        raise _missing(upload.id)
    outer = await workspace_key(connection, store.vault, upload.workspace_id)
    return unwrap(outer, upload.sealed_key, f"resumable {upload.id}")


def _upload(row: Any) -> Resumable:
    return Resumable(**{field.name: getattr(row, field.name) for field in fields(Resumable)})


def _missing(id: str) -> NotFound:
    """The same for an id that never was, that is over, and that is another's."""
    return NotFound(f"Upload `{id}` not found.")


def _late(upload: Resumable, offset: int) -> ResumeFailed:
    return ResumeFailed(
        f"upload `{upload.id}` does not go on at byte {offset:,}: ask for its Upload-Offset, and send from there", 409
    )
