"""What time does to files: they expire, and what a crash left behind is swept. What the disk does to them: integrity.py.

Everything here may be cut short at any point and run again, beside uploads and deletions and by several processes at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from sqlalchemy import delete, select, tuple_, update

from ropewalk.database import now
from ropewalk.failpoints import failpoint
from ropewalk.files import catalog, resumable
from ropewalk.files.archives import give_back
from ropewalk.files.store import Doomed, Store
from ropewalk.files.tables import archives, blobs, derived, erasures, files, parts, uploads
from ropewalk.files.token_ledger import sample_storage
from ropewalk.tenants import quotas
from ropewalk.tenants.audit import append
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import workspaces
from ropewalk.vault import sealed_size

BATCH = 100  # rows of one transaction
NAMES = 500  # names looked up at once
DAY = 24 * 3600 * 1_000_000
DERIVING = 600 * 1_000_000  # a derived thing whose bytes are not there after so long was given up

# The columns that name stored bytes, in the order in which bytes can go from one to the next between two looks.
NAMED_BY = (uploads.c.id, blobs.c.id, parts.c.name, derived.c.stored, archives.c.id, erasures.c.stored)


@dataclass
class SweepReport:
    """How many there were of each."""

    expired: int = 0  # files whose hour had passed
    abandoned: int = 0  # uploads and archives not heard of for too long, and resumable uploads whose time was over
    orphans: int = 0  # stored bytes that no row refers to
    erased: int = 0  # bytes whose erasure had been cut short
    purged: int = 0  # rows of files that expired long ago
    missing: int = 0  # rows whose bytes are not there, or not as many as there should be

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


# -- expiry


async def expire(store: Store) -> int:
    """Files whose hour has passed give back their place under the quotas, their bytes and their data keys."""
    count = 0
    while rows := await _expire_some(store):
        count += rows
    return count


async def _expire_some(store: Store) -> int:
    moment, doomed = now(), list[Doomed]()
    due = (files.c.expires_at <= moment) & files.c.expired_at.is_(None)
    async with store.database.reading() as connection:
        if (await connection.execute(select(files.c.id).where(due).limit(1))).first() is None:
            return 0
    # Locks are taken in the same order by all: files, contents, quotas, chains.
    query = (
        select(files, workspaces.c.downloads, workspaces.c.organization_id)
        .join(workspaces, workspaces.c.id == files.c.workspace_id)
        .where(due)
        .order_by(files.c.blob_id)
        .limit(BATCH)
        .with_for_update(skip_locked=True, of=files)
    )
    async with store.database.writing() as connection:
        rows = (await connection.execute(query)).all()
        left = [await store.release_content(connection, catalog.as_file(row)) for row in rows]
        doomed += (one for released in left for one in released.doomed)
        ids = [row.id for row in rows]
        await connection.execute(update(files).where(files.c.id.in_(ids)).values(expired_at=moment, blob_id=None))
        owners = [Caller(row.organization_id, row.workspace_id, row.key_id, row.user_id) for row in rows]
        for row, owner in zip(rows, owners):
            await quotas.release(connection, owner, row.size)
        for released in left:
            await give_back(connection, released.kept)
        for row, owner in zip(rows, owners):
            await append(connection, owner, "file_expired", row.id)
    failpoint("expire.committed")
    await store.erase(doomed)
    return len(rows)


# -- the sweep


async def sweep(store: Store, *, thorough: bool = True) -> SweepReport:
    """Expires what is due and sets right what crashes left; a thorough sweep looks at every stored name and every row."""
    report = SweepReport(expired=await expire(store), abandoned=await _abandon(store) + await resumable.expire(store))
    report.abandoned += await store.archives.abandon()
    report.orphans = await _sweep_staged(store)
    report.erased = await _erase_again(store)
    report.purged = await _purge(store)
    await sample_storage(store.database)
    if thorough:
        report.orphans += await _sweep_published(store)
        report.missing = await _find_missing(store)
    await store.database.forget()
    return report


async def _abandon(store: Store) -> int:
    """Uploads whose lease has run out: what they reserved is given back, and what they stored is erased."""
    async with store.database.reading() as connection:
        late = uploads.c.lease_until < now()
        if (await connection.execute(select(uploads.c.id).where(late).limit(1))).first() is None:
            return 0
    async with store.database.writing() as connection:
        rows = (await connection.execute(delete(uploads).where(late).returning(uploads))).all()
        for row in rows:
            owner = Caller(row.organization_id, row.workspace_id, row.key_id, row.user_id)
            await quotas.release(connection, owner, row.reserved_bytes, reserved=True)
    for row in rows:  # should one of them publish its bytes after all, they are orphans, which a thorough sweep finds
        await asyncio.to_thread(store.blobs.discard, row.id)
        await asyncio.to_thread(store.blobs.erase, row.id)
        failpoint("sweep.erased")
    return len(rows)


async def _sweep_staged(store: Store) -> int:
    count = 0
    async for names in _listed(store.blobs.staged):
        async with store.database.reading() as connection:
            alive = set((await connection.execute(select(uploads.c.id).where(uploads.c.id.in_(names)))).scalars())
            young = (derived.c.stored.in_(names), derived.c.created_at > now() - DERIVING)
            alive |= set((await connection.execute(select(derived.c.stored).where(*young))).scalars())
            alive |= set((await connection.execute(select(parts.c.name).where(parts.c.name.in_(names)))).scalars())
            alive |= set((await connection.execute(select(archives.c.id).where(archives.c.id.in_(names)))).scalars())
        for name in names - alive:
            await asyncio.to_thread(store.blobs.discard, name)
            count += 1
    return count


async def _sweep_published(store: Store) -> int:
    """Bytes that no row refers to. Names are listed first and rows read after: a row comes before its bytes and goes before them."""
    count = 0
    async for names in _listed(store.blobs.names):
        async with store.database.reading() as connection:
            known = set[str]()
            for column in NAMED_BY:
                known |= set((await connection.execute(select(column).where(column.in_(names)))).scalars())
        for name in names - known:
            await asyncio.to_thread(store.blobs.erase, name)
            failpoint("sweep.erased")
            count += 1
    return count


async def _erase_again(store: Store) -> int:
    """Bytes whose rows were deleted by a process that then died, or could not reach them."""
    key, last, count = tuple_(erasures.c.place, erasures.c.stored), ("", ""), 0
    while True:
        async with store.database.reading() as connection:
            rows = (
                await connection.execute(
                    select(erasures).where(key > last).order_by(erasures.c.place, erasures.c.stored).limit(BATCH)
                )
            ).all()
        if not rows:
            return count
        last = (rows[-1].place, rows[-1].stored)
        count += await store.erase([(row.place, row.stored) for row in rows])
        failpoint("sweep.erased")


async def _purge(store: Store) -> int:
    """What is still known of files that expired long ago."""
    old = files.c.expired_at.is_not(None) & (files.c.expires_at <= now() - store.settings.keep_metadata_days * DAY)
    async with store.database.reading() as connection:
        if (await connection.execute(select(files.c.id).where(old).limit(1))).first() is None:
            return 0
    async with store.database.writing() as connection:
        return (await connection.execute(delete(files).where(old))).rowcount


async def _find_missing(store: Store) -> int:
    count, last = 0, ""
    while True:
        async with store.database.reading() as connection:
            query = select(blobs.c.id, blobs.c.size).where(blobs.c.id > last, blobs.c.damaged_at.is_(None))
            rows = (await connection.execute(query.order_by(blobs.c.id).limit(NAMES))).all()
        if not rows:
            return count
        last = rows[-1].id
        for id in await asyncio.to_thread(_wrong_sizes, store, [(row.id, row.size) for row in rows]):
            if await _is_there(store, id):  # not deleted since it was listed
                await store.mark_damaged(id)
                count += 1


async def _listed(names: Callable[[], Iterator[str]]) -> AsyncIterator[set[str]]:
    """Names in groups, listed in a thread."""
    iterator = await asyncio.to_thread(names)
    while group := await asyncio.to_thread(lambda: set(islice(iterator, NAMES))):
        yield group


def _wrong_sizes(store: Store, contents: Iterable[tuple[str, int]]) -> list[str]:
    wrong = []
    for name, size in contents:
        try:
            if store.blobs.size(name) != sealed_size(size):
                wrong.append(name)
        except FileNotFoundError:
            wrong.append(name)
    return wrong


async def _is_there(store: Store, id: str) -> bool:
    async with store.database.reading() as connection:
        return (await connection.execute(select(blobs.c.id).where(blobs.c.id == id))).first() is not None
