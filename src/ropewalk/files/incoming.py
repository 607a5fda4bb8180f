"""One upload on its way in: reserved, hashed, sealed and staged as it comes; durable when `finish` returns, or nothing at all.

reserve quota, write down the upload       transaction 1
stage the sealed bytes                     under the upload's id
sync, publish                              under a name that no other bytes ever had
row, quota settled, upload forgotten       transaction 2
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import now
from ropewalk.errors import BadInput, Overloaded, QuotaExceeded, TooLarge
from ropewalk.failpoints import failpoint
from ropewalk.files import catalog
from ropewalk.files.blobs import Staged
from ropewalk.files.catalog import File
from ropewalk.files.media import sniff
from ropewalk.files.names import extension_of, stored_name
from ropewalk.files.tables import FILES, blobs, derived, erasures, files, uploads
from ropewalk.ids import new_id
from ropewalk.tenants import quotas
from ropewalk.tenants.audit import append
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.vault import CHUNK, Sealer, derive, new_key, wrap

if TYPE_CHECKING:
    from ropewalk.files.store import Store

RESERVE_STEP = 16 << 20  # bytes set aside at a time when nobody said how many will come
HEAD = 1 << 16  # first bytes, by which the media type is told


@dataclass(frozen=True)
class Made:
    """How a file came about that was written here."""

    kind: str  # of thing, such as questions
    name: str  # of what wrote it, such as a job's id
    sources: tuple[str, ...]  # files
    lineage: Mapping[str, Any]  # what is told of it beside them


class Incoming:
    """The bytes of one upload; made by `Store.incoming`."""

    def __init__(self, store: Store, caller: Caller, at_most: int | None, request_id: str) -> None:
        self._store, self._caller, self._at_most, self._request_id = store, caller, at_most, request_id
        self.id = secrets.token_hex(16)  # and the name of the bytes: never used before, telling nothing of them
        self.size = 0
        self._reserved = 0
        self._head = b""
        self._waiting: list[bytes | memoryview] = []  # pieces of chunks that are not yet full
        self._waiting_bytes = 0
        self._working: asyncio.Future[None] | None = None
        self._digest = hashlib.sha256()
        self._staged: Staged | None = None
        self._done = False

    async def __aenter__(self) -> Incoming:
        if self._at_most is not None and self._at_most > self._store.max_file_bytes:
            raise self._too_large()
        async with self._store.database.reading() as connection:
            self._workspace_key = await workspace_key(connection, self._store.vault, self._caller.workspace_id)
        self._reserved = RESERVE_STEP if self._at_most is None else self._at_most
        try:
            await self._begin()
        except QuotaExceeded:
            from ropewalk.files.lifecycle import expire  # imports the store

            await expire(self._store)  # what has expired takes no room, whether or not the sweep has been there
            await self._begin()
        failpoint("upload.reserved")
        self._data_key = new_key()
        self._sealer = Sealer(self._data_key, self.id)
        try:
            self._staged = await asyncio.to_thread(self._store.blobs.stage, self.id)
        except BaseException:
            await asyncio.shield(self._abandon())
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._done:
            await asyncio.shield(self._abandon())

    async def write(self, data: bytes | memoryview) -> None:
        """More of the bytes, in pieces of any size; returns before they are on the disk, but never runs far ahead of it."""
        self.size += len(data)
        if self.size > self._store.max_file_bytes:
            raise self._too_large()
        if len(self._head) < HEAD:
            self._head += bytes(data[: HEAD - len(self._head)])
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        # A chunk is sealed only when more is known to follow, since the last one is sealed as such.
        while self._waiting_bytes > CHUNK:
            await self._absorb(self._take_chunk(), last=False)
        if self.size > self._reserved:
            await self._reserve_more()
        if time.monotonic() - self._heard > self._store.lease_seconds / 3:
            await self._renew()

    async def finish(
        self,
        filename: str | None,
        mime_type: str | None = None,
        *,
        expires_in: int | None = None,
        tags: Sequence[str] = (),
        retried: bool = False,
        purpose: str | None = None,
        made: Made | None = None,
    ) -> File:
        """The file, durable; `retried` says that the client may have sent these bytes before and not heard the answer.

        `made`: it was written here, from other files, and goes with them.
        """
        media = sniff(self._head, filename, mime_type)
        name = stored_name(filename, extension_of(media))
        await self._absorb(self._waiting, last=True)
        self._waiting = []
        await self._settle()
        await self._renew()  # syncing may take long
        failpoint("upload.staged")
        assert self._staged is not None
        await asyncio.to_thread(self._staged.publish, self.id)
        failpoint("upload.published")
        sha256 = self._digest.hexdigest()
        async with self._store.database.writing() as connection:
            again = await self._sent_before(connection, name, sha256) if retried else None
            file = again or await self._record(connection, name, media, sha256, expires_in, tags, purpose, made)
            if again:
                await self._forget(connection)
                await connection.execute(insert(erasures).values(place="blobs", stored=self.id))
        self._done = True
        failpoint("upload.committed")
        if again or file.blob_id != self.id:  # equal bytes were there already
            await self._store.erase([("blobs", self.id)])
        for tell in self._store.arrivals:
            tell(self._caller, file)
        return file

    async def _begin(self) -> None:
        async with self._store.database.writing() as connection:
            await self._set_aside(connection)
            await connection.execute(
                insert(uploads).values(
                    id=self.id,
                    organization_id=self._caller.organization_id,
                    workspace_id=self._caller.workspace_id,
                    user_id=self._caller.user_id,
                    key_id=self._caller.key_id,
                    reserved_bytes=self._reserved,
                    lease_until=self._lease(),
                    created_at=now(),
                )
            )

    async def _set_aside(self, connection: AsyncConnection) -> None:
        await quotas.reserve(connection, self._caller, self._reserved)

    async def _record(
        self,
        connection: AsyncConnection,
        name: str,
        media: str,
        sha256: str,
        expires_in: int | None,
        tags: Sequence[str],
        purpose: str | None,
        made: Made | None,
    ) -> File:
        for source in made.sources if made is not None else ():
            await self._hold(connection, source)
        # A user's own bytes are shared with nobody: who deletes a file must not learn that somebody else has it too.
        user = self._caller.user_id
        content = hmac.digest(
            derive(self._workspace_key, f"content {user}" if user else "content"), bytes.fromhex(sha256), "sha256"
        )
        insertion = self._store.database.upsert(blobs).values(
            id=self.id,
            workspace_id=self._caller.workspace_id,
            content_hmac=content,
            size=self.size,
            sealed_key=wrap(self._workspace_key, self._data_key, f"data {self.id}"),
            refs=1,
            created_at=now(),
        )
        shared = insertion.on_conflict_do_update(
            index_elements=[blobs.c.workspace_id, blobs.c.content_hmac], set_={"refs": blobs.c.refs + 1}
        )
        blob_id = (await connection.execute(shared.returning(blobs.c.id))).scalar_one()
        if blob_id != self.id:
            await connection.execute(insert(erasures).values(place="blobs", stored=self.id))
        created = now()
        row: dict[str, Any] = {
            "id": new_id("file"),
            "workspace_id": self._caller.workspace_id,
            "user_id": self._caller.user_id,
            "key_id": self._caller.key_id,
            "blob_id": blob_id,
            "filename": name,
            "mime_type": media,
            "size": self.size,
            "sha256": sha256,
            "tags": list(tags),
            "created_at": created,
            "expires_at": None if expires_in is None else created + expires_in * 1_000_000,
            "expired_at": None,
            "purpose": purpose,
            "lineage": None if made is None else {**made.lineage, "files": list(made.sources)},
        }
        await connection.execute(insert(files).values(row))
        for source in made.sources if made is not None else ():
            assert made is not None
            tie = {"owner": source, "kind": made.kind, "name": made.name, "place": FILES, "stored": row["id"], "size": 0}
            await connection.execute(insert(derived).values(**tie, created_at=created))
        await self._forget(connection, size=self.size)
        file = await catalog.find(connection, self._caller, row["id"])
        await append(
            connection, self._caller, "file_uploaded", file.id, request_id=self._request_id, detail={"bytes": self.size}
        )
        return file

    async def _hold(self, connection: AsyncConnection, source: str) -> None:
        """Keeps a file that this one was made from, until the transaction ends; NotFound where it is gone."""
        alive = select(files.c.id).where(files.c.id == source, catalog.visible(self._caller), files.c.expired_at.is_(None))
        if not (await connection.execute(alive.with_for_update())).scalar():
            raise catalog.missing(source)

    async def _forget(self, connection: AsyncConnection, size: int | None = None) -> None:
        """The upload is no more; its reservation becomes use, or is given back."""
        # What the row says is what was reserved, also when a cancelled task never heard that it was.
        reserved = (await connection.execute(delete(uploads).where(self._row).returning(uploads.c.reserved_bytes))).scalar()
        if reserved is None:
            raise self._given_up()
        if size is None:
            await quotas.release(connection, self._caller, reserved, reserved=True)
        else:
            await quotas.settle(connection, self._caller, reserved, size)

    async def _sent_before(self, connection: AsyncConnection, name: str, sha256: str) -> File | None:
        """The file that an earlier attempt of this upload made, whose answer the client may not have heard."""
        since = now() - int(self._store.coalesce_seconds * 1_000_000)
        same = (
            select(files.c.id)
            .where(
                catalog.visible(self._caller),
                files.c.key_id == self._caller.key_id,
                files.c.sha256 == sha256,
                files.c.filename == name,
                files.c.created_at > since,
            )
            .order_by(files.c.created_at.desc())
        )
        id = (await connection.execute(same.limit(1))).scalar()
        return await catalog.find(connection, self._caller, id) if id else None

    async def _abandon(self) -> None:
        self._done = True
        if self._working is not None:
            await asyncio.gather(self._working, return_exceptions=True)
        if self._staged is not None:
            await asyncio.to_thread(self._staged.discard)
        async with self._store.database.writing() as connection:
            reserved = (await connection.execute(delete(uploads).where(self._row).returning(uploads.c.reserved_bytes))).scalar()
            if reserved is not None:
                await quotas.release(connection, self._caller, reserved, reserved=True)
        # If the upload's row was gone, the last transaction may have been committed although it raised; the sweep will know.
        if reserved is not None:
            await asyncio.to_thread(self._store.blobs.erase, self.id)

    async def _reserve_more(self) -> None:
        more = self.size - self._reserved
        # A length that was told is exceeded by a line break at most; where none was told, much more may come.
        step = max(RESERVE_STEP, more) if self._at_most is None else more
        async with self._store.database.writing() as connection:
            await self._change(connection, reserved_bytes=uploads.c.reserved_bytes + step)
            await quotas.reserve(connection, self._caller, step, files=0)
        self._reserved += step

    async def _renew(self) -> None:
        async with self._store.database.writing() as connection:
            await self._change(connection, lease_until=self._lease())

    async def _change(self, connection: AsyncConnection, **values: Any) -> None:
        if not (await connection.execute(update(uploads).where(self._row).values(**values))).rowcount:
            raise self._given_up()

    @property
    def _row(self) -> ColumnElement[bool]:
        return uploads.c.id == self.id

    def _given_up(self) -> Overloaded:
        """The sweep has taken this upload for dead, and given back what it had reserved."""
        return Overloaded(
            f"the upload was silent for more than {self._store.lease_seconds:g} s and was given up; send it again"
        )

    def _lease(self) -> int:
        self._heard = time.monotonic()
        return now() + int(self._store.lease_seconds * 1_000_000)

    def _take_chunk(self) -> list[memoryview]:
        """The pieces of the first CHUNK bytes that wait; the rest of the last piece waits on. Nothing is copied."""
        taken, missing = [], CHUNK
        pieces = iter(self._waiting)
        for piece in pieces:
            if len(piece) > missing:
                view = memoryview(piece)
                taken.append(view[:missing])
                rest: list[bytes | memoryview] = [view[missing:]]
                break
            taken.append(memoryview(piece))
            missing -= len(piece)
            if not missing:
                rest = []
                break
        self._waiting = [*rest, *pieces]
        self._waiting_bytes -= CHUNK
        return taken

    async def _absorb(self, pieces: Sequence[bytes | memoryview], *, last: bool) -> None:
        """Hashes, seals and writes a chunk in a thread, while the next one comes in."""
        await self._settle()
        # Not a task: that would begin only once there is nothing to receive.
        self._working = asyncio.get_running_loop().run_in_executor(None, self._work, pieces, last)

    def _work(self, pieces: Sequence[bytes | memoryview], last: bool) -> None:
        assert self._staged is not None
        plain = b"".join(pieces)
        self._digest.update(plain)
        self._staged.write(self._sealer.seal(plain, last))

    async def _settle(self) -> None:
        if self._working is not None:
            working, self._working = self._working, None
            await working

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the file is larger than {self._store.max_file_bytes:,} bytes, the most that a file may have here")


def checked_expiry(seconds: int | None) -> int | None:
    """`expires_in_seconds` within its bounds: an hour to 90 days."""
    if seconds is not None and not 3600 <= seconds <= 7_776_000:
        raise BadInput(f"expires_in_seconds: {seconds} is not between 3600 (an hour) and 7776000 (90 days)")
    return seconds
