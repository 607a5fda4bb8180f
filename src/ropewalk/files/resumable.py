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
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import now
from ropewalk.errors import QuotaExceeded, ResumeFailed, TooLarge
from ropewalk.files.catalog import File
from ropewalk.files.incoming import Incoming
from ropewalk.files.names import stored_name
from ropewalk.files.parts import LIFE, Part, Resumable, as_resumable, contents, late, missing
from ropewalk.files.store import Store
from ropewalk.files.tables import erasures, parts, resumables
from ropewalk.ids import new_id
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.vault import new_key, wrap

PART = 64 << 20  # bytes of one request that become durable together, unless a checksum is to be awaited
ALGORITHMS = ("sha256", "sha1")

Checksum: TypeAlias = tuple[str, bytes]  # one of ALGORITHMS, and the digest

_finishing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()


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
    id, moment = new_id("upload"), now()
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
        raise late(upload, offset)
    digest = hashlib.new(checksum[0]) if checksum else None
    part: Part | None = None
    try:
        while True:
            try:
                piece = await anext(pieces, None)
            except Exception:  # they stopped coming; an error of our own, below, leaves nothing of the part
                if part and not digest:
                    await part.publish()
                raise
            if piece is None:
                break
            if upload.received + (part.size if part else 0) + len(piece) > upload.length:
                raise TooLarge(f"upload `{id}` was announced with {upload.length:,} bytes, and more than that came")
            if part is None:
                part = await Part.begin(store, upload)
            await part.write(piece)
            if digest:
                digest.update(piece)
            elif part.size >= PART:
                upload, part = await part.publish(), None
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
                    async for plain in contents(store, upload):
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
            doomed = await _end(store, connection, as_resumable(row))
        await store.erase(doomed)
        count += 1


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
            raise missing(self._upload.id)
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
        raise missing(id)
    return as_resumable(row)


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
