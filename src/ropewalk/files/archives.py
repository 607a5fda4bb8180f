"""Folders kept sealed in the blob store, where every server can read them: the checkpoints of a job, and the adapter that it made.

begin     a row with a key of its own and a lease, and a ticket with which packing.py writes
finish    counted under the quotas, instead of the older one of its name
ticket    with which it is read
drop      forgotten with its key, and then erased

One that holds words of files is tied to them: deleting a file destroys the archive's key in the same transaction.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import Database, now
from ropewalk.errors import DamagedContent, QuotaExceeded
from ropewalk.failpoints import failpoint
from ropewalk.files import catalog, packing
from ropewalk.files.packing import Ticket
from ropewalk.files.tables import ARCHIVES, archives, derived, erasures, files
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.vault import new_key, unwrap, wrap

if TYPE_CHECKING:
    from ropewalk.files.store import Store

LEASE = 600 * 1_000_000  # one on its way that is not heard of for so long is given up
KIND = "archive"

Guard = Callable[[AsyncConnection], Awaitable[bool]]
Gone = tuple[str, Caller, int]  # an archive's id, whose it was, and how many bytes were counted


@dataclass(frozen=True)
class Kept:
    """An archive that is whole."""

    id: str
    name: str
    size: int
    created_at: int


class Archives:
    """All archives of one installation."""

    def __init__(self, store: Store) -> None:
        self._store, self._database = store, store.database

    async def begin(self, caller: Caller, owner: str, name: str, of: Sequence[str] = (), kind: str = KIND) -> Ticket:
        """Leave to write one; `of` are the files whose words it will hold, NotFound where one of them is gone."""
        id, key = secrets.token_hex(16), new_key()
        async with self._database.writing() as connection:
            for file_id in sorted(set(of)):
                alive = select(files.c.id).where(files.c.id == file_id, files.c.expired_at.is_(None)).with_for_update()
                if not (await connection.execute(alive)).scalar():
                    raise catalog.missing(file_id)
                tie = {"owner": file_id, "kind": kind, "name": id, "place": ARCHIVES, "stored": id, "size": 0}
                await connection.execute(insert(derived).values(**tie, created_at=now()))
            row = {
                "id": id,
                "owner": owner,
                "name": name,
                "organization_id": caller.organization_id,
                "workspace_id": caller.workspace_id,
                "user_id": caller.user_id,
                "key_id": caller.key_id,
                "size": None,
                "lease_until": now() + LEASE,
                "sealed_key": wrap(await self._workspace_key(connection, caller.workspace_id), key, _purpose(id)),
                "created_at": now(),
            }
            await connection.execute(insert(archives).values(row))
        return Ticket(self._store.settings.blobs_at, id, key)

    async def renew(self, ticket: Ticket) -> None:
        """Says that it is still being written."""
        async with self._database.writing() as connection:
            mine = (archives.c.id == ticket.id) & archives.c.size.is_(None)
            await connection.execute(update(archives).where(mine).values(lease_until=now() + LEASE))

    async def finish(self, ticket: Ticket, size: int, guard: Guard | None = None) -> bool:
        """It is written; it counts, and the older one of its name is erased. False, and it is erased itself, where its files are gone,
        its lease has run out, or `guard` says no in the same transaction. QuotaExceeded leaves nothing of it either."""
        try:
            async with self._database.writing() as connection:
                done, doomed = await self._finish(connection, ticket, size, guard)
        except QuotaExceeded:
            await self._drop(archives.c.id == ticket.id)
            raise
        await self._store.erase(doomed)
        return done

    async def _finish(
        self, connection: AsyncConnection, ticket: Ticket, size: int, guard: Guard | None
    ) -> tuple[bool, list[tuple[str, str]]]:
        allowed = guard is None or await guard(connection)
        mine = (archives.c.id == ticket.id) & archives.c.size.is_(None)
        row = (await connection.execute(select(archives).where(mine))).first()
        if row is None:  # its file is gone, or nobody believed it alive any more
            return False, await _doom(self._database, connection, [("blobs", ticket.id)])
        if not allowed:
            return False, await let_go(self._database, connection, archives.c.id == ticket.id)
        same = (archives.c.owner == row.owner) & (archives.c.name == row.name) & archives.c.size.is_not(None)
        doomed = await let_go(self._database, connection, same)
        counted = await connection.execute(update(archives).where(mine).values(size=size, lease_until=0))
        if not counted.rowcount:  # its file was deleted a moment ago
            return False, [*doomed, *await _doom(self._database, connection, [("blobs", ticket.id)])]
        owner = _owner(row)
        await quotas.reserve(connection, owner, size, 0)
        await quotas.settle(connection, owner, size, size, 0)
        return True, doomed

    async def keep(
        self,
        caller: Caller,
        owner: str,
        name: str,
        folder: Path,
        paths: Sequence[str],
        of: Sequence[str] = (),
        kind: str = KIND,
        guard: Guard | None = None,
    ) -> bool:
        """All of it, for a folder of this machine; FileNotFoundError where a file goes while it is packed."""
        ticket = await self.begin(caller, owner, name, of, kind)
        written = asyncio.ensure_future(asyncio.to_thread(packing.pack, ticket, folder, paths))
        try:
            while not (await asyncio.wait({written}, timeout=LEASE / 4e6))[0]:
                await self.renew(ticket)
            size = written.result()
        except BaseException:
            await asyncio.wait({written})  # what is erased before it was written would stay
            await self._drop(archives.c.id == ticket.id)
            raise
        return await self.finish(ticket, size, guard)

    async def find(self, owner: str) -> dict[str, Kept]:
        """Those of an owner that are whole, by their names."""
        whole = select(archives).where(archives.c.owner == owner, archives.c.size.is_not(None))
        async with self._database.reading() as connection:
            rows = (await connection.execute(whole.order_by(archives.c.name))).all()
        return {row.name: Kept(row.id, row.name, row.size, row.created_at) for row in rows}

    async def ticket(self, owner: str, name: str) -> Ticket | None:
        """Leave to read one; None where there is none."""
        query = select(archives).where(archives.c.owner == owner, archives.c.name == name, archives.c.size.is_not(None))
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).first()
            if row is None:
                return None
            outer = await self._workspace_key(connection, row.workspace_id)
        return Ticket(self._store.settings.blobs_at, row.id, unwrap(outer, row.sealed_key, _purpose(row.id)), row.size)

    async def drop(self, owner: str, names: Collection[str] | None = None) -> int:
        """Erases those of an owner, all or some; how many that were."""
        mine = archives.c.owner == owner
        return await self._drop(mine if names is None else mine & archives.c.name.in_(names))

    async def drop_workspace(self, workspace_id: str) -> int:
        """Erases all of a workspace; how many that were."""
        return await self._drop(archives.c.workspace_id == workspace_id)

    async def abandon(self) -> int:
        """Erases those on their way that nobody has been heard of for too long."""
        late = archives.c.size.is_(None) & (archives.c.lease_until < now())
        async with self._database.reading() as connection:
            if (await connection.execute(select(archives.c.id).where(late).limit(1))).first() is None:
                return 0
        return await self._drop(late)

    async def verify(self) -> tuple[int, int, list[str]]:
        """Reads every byte: how many archives and bytes those were, and what is wrong."""
        async with self._database.reading() as connection:
            rows = (await connection.execute(select(archives).where(archives.c.size.is_not(None)))).all()
        faults = []
        for row in rows:
            try:
                ticket = await self.ticket(row.owner, row.name)
                if ticket is not None and ticket.id == row.id:
                    await asyncio.to_thread(packing.check, ticket)
            except DamagedContent as error:
                if row.name in await self.find(row.owner):  # not erased meanwhile
                    faults.append(f"archive {row.name} of {row.owner}: {error}")
        return len(rows), sum(row.size for row in rows), faults

    async def _drop(self, which: ColumnElement[bool]) -> int:
        async with self._database.writing() as connection:
            doomed = await let_go(self._database, connection, which)
        failpoint("archive.dropped")
        await self._store.erase(doomed)
        return len(doomed)

    async def _workspace_key(self, connection: AsyncConnection, workspace_id: str) -> bytes:
        return await workspace_key(connection, self._store.vault, workspace_id)


async def let_go(database: Database, connection: AsyncConnection, which: ColumnElement[bool]) -> list[tuple[str, str]]:
    """Forgets archives and their keys, and gives back their place under the quotas; what is to be erased after the commit."""
    ids = list((await connection.execute(select(archives.c.id).where(which))).scalars())
    # Ties before rows, as where a file is deleted.
    await connection.execute(delete(derived).where(derived.c.place == ARCHIVES, derived.c.stored.in_(ids)))
    gone = await forget(connection, ids)
    await give_back(connection, gone)
    return await _doom(database, connection, [("blobs", id) for id, _, _ in gone])


async def forget(connection: AsyncConnection, ids: Collection[str]) -> list[Gone]:
    """Deletes the rows of archives, and with them their keys; the quotas are given back what they took by `give_back`."""
    if not ids:
        return []
    gone = await connection.execute(delete(archives).where(archives.c.id.in_(ids)).returning(archives))
    return [(row.id, _owner(row), row.size or 0) for row in gone.all()]


async def give_back(connection: AsyncConnection, gone: Sequence[Gone]) -> None:
    for _, owner, size in gone:
        if size:
            await quotas.release(connection, owner, size, 0)


async def _doom(database: Database, connection: AsyncConnection, doomed: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if doomed:
        rows = [{"place": place, "stored": stored} for place, stored in doomed]
        await connection.execute(database.upsert(erasures).on_conflict_do_nothing(), rows)
    return doomed


def _owner(row: Any) -> Caller:
    return Caller(row.organization_id, row.workspace_id, row.key_id, row.user_id)


def _purpose(id: str) -> str:
    return f"archive {id}"
