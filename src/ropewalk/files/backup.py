"""A backup of a store while it is at work, and back: whatever holds the state, a backup is one folder with SQLite and blobs in it.

    DIR/ropewalk.db    the rows as they were at one moment, less what was deleted since
    DIR/files/         the bytes that they refer to, sealed as they are in the store
    DIR/backup.json    when it was made and what it holds; written last

Rows come first and bytes after. Bytes are published before their row is written, never change, and their names are never used
again: so the bytes of every row can be copied at leisure, and only a deletion can take them away meanwhile. Bytes first would miss
those of every file that came between. What was deleted or expired before the backup ends leaves it too. A second backup into the
same folder copies only bytes that are new, and replaces the rows of the first in one step when all is there.

The root key is not part of it: without that key a backup is noise, and beside it a backup is everything.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Table, delete, func, insert, inspect, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.batches.tables import batch_items, batches
from ropewalk.database import Database, metadata
from ropewalk.errors import BadInput, DamagedContent, NotFound, OutputError
from ropewalk.files.blobs import Blobs, LocalBlobs, open_blobs
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.files.tables import ARCHIVES, archives, blobs, derived, erasures, files, parts, resumables, uploads
from ropewalk.folders import sync_folder
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.secrets import check_root
from ropewalk.tenants.tables import organizations, usage, workspaces
from ropewalk.vault import Vault, sealed_size

ROWS = "ropewalk.db"
BYTES = "files"
MARK = "backup.json"
UNFINISHED = "{}\n"
LEFT_OUT = (
    *(uploads, resumables, parts, erasures),  # what is under way is not a file yet, or not one any more
    *(batches, batch_items),  # results are given out for a month at most, and deleted when they have been fetched
)
BATCH = 500
PIECE = 4 << 20
AT_ONCE = 8  # blobs copied at a time: each waits for the disk

Progress = Callable[[int], None]


@dataclass(frozen=True)
class BackupReport:
    """What a backup holds, and what it could not have."""

    made_at: str
    files: int
    contents: int
    size: int  # bytes, sealed
    copied: int  # contents that this run copied; the others were there already
    missing: int  # contents that the store itself has lost


async def backup(store: Store, folder: Path, progress: Progress | None = None) -> BackupReport:
    """Writes a backup, or brings an older one in the same folder up to date; safe to cut short and run again."""
    _is_fit(store.settings, folder)
    made_at, target = datetime.now(UTC).isoformat(timespec="seconds"), LocalBlobs(folder / BYTES)
    if not (folder / MARK).exists():
        (folder / MARK).write_text(UNFINISHED, encoding="utf-8")
    for left in target.staged():
        target.discard(left)
    fresh = folder / f"{ROWS}.new"
    _remove_database(fresh)
    async with _opened(f"sqlite:///{fresh}") as copy:
        async with store.database.reading() as rows, copy.writing() as out:
            if store.database.dialect == "postgresql":  # one moment for all tables; SQLite has no other way
                await rows.execution_options(isolation_level="REPEATABLE READ")
            await _copy_rows(rows, out)
        wanted = await _names(copy)
        copied, absent = await _copy_bytes(store.blobs, target, wanted, progress)
        missing = await _leave_out_deleted(store.database, copy, absent)
        held = await _names(copy)
        async with copy.reading() as rows:
            count = (await rows.execute(select(func.count()).select_from(files))).scalar_one()
    report = BackupReport(made_at, count, len(held), sum(held.values()), copied, missing)
    await asyncio.to_thread(_replace, fresh, folder, report)
    for name in set(target.names()) - held.keys():  # of an older backup, or deleted while this one was made
        await asyncio.to_thread(target.erase, name)
    return report


async def restore(folder: Path, settings: Settings, progress: Progress | None = None) -> BackupReport:
    """Fills an empty place, folder or database and bucket, from a backup; the root key must be the one of that time."""
    report = read_mark(folder)
    vault, source, target = Vault.open(settings.data), LocalBlobs(folder / BYTES), open_blobs(settings.blobs_at)
    with tempfile.TemporaryDirectory(prefix="ropewalk-restore-") as aside:
        # A backup of an older version is brought to this one, and the backup itself stays as it is.
        shutil.copyfile(folder / ROWS, Path(aside) / ROWS)
        async with _opened(f"sqlite:///{aside}/{ROWS}") as copy, _opened(settings.database) as database:
            async with copy.reading() as rows:
                await check_root(rows, vault)
            async with database.reading() as there:
                if (await there.execute(select(organizations.c.id).limit(1))).first() is not None:
                    raise BadInput("a store is there already: restore into an empty place, and name it with --data or its URLs")
            # Bytes before rows: cut short, this leaves no row without bytes, and can be run again.
            _, absent = await _copy_bytes(source, target, await _names(copy), progress)
            if len(absent) > report.missing:
                raise DamagedContent(f"the backup in '{folder}' lacks the bytes of {len(absent)} contents: {min(absent)}, ...")
            async with copy.reading() as rows, database.writing() as out:
                await _copy_rows(rows, out)
    return report


def read_mark(folder: Path) -> BackupReport:
    """What the finished backup in a folder says of itself."""
    with suppress(OSError, ValueError, TypeError):
        return BackupReport(**json.loads((folder / MARK).read_text(encoding="utf-8")))
    raise NotFound(f"there is no finished backup in '{folder}': its {MARK} is not there, or says so")


# -- rows


async def _copy_rows(rows: AsyncConnection, out: AsyncConnection) -> None:
    there = set(await rows.run_sync(lambda connection: inspect(connection).get_table_names())) - {"alembic_version"}
    assert there <= metadata.tables.keys(), f"tables that nobody has imported: {there - metadata.tables.keys()}"
    for table in metadata.sorted_tables:
        if table in LEFT_OUT:
            continue
        if rows.dialect.name == "postgresql":
            async for part in (await rows.stream(select(table))).mappings().partitions(BATCH):
                await out.execute(insert(table), [dict(row) for row in part])
        else:
            for part in (await rows.execute(select(table))).mappings().partitions(BATCH):
                await out.execute(insert(table), [dict(row) for row in part])


async def _names(copy: Database) -> dict[str, int]:
    """Every name in the blob store that rows refer to, with the size of its bytes."""
    async with copy.reading() as rows:
        held = {row.id: sealed_size(row.size) for row in await rows.execute(select(blobs.c.id, blobs.c.size))}
        made = select(derived.c.stored, derived.c.size).where(derived.c.place == "blobs")
        whole = select(archives.c.id, archives.c.size).where(archives.c.size.is_not(None))
        held |= {row.id: sealed_size(row.size) for row in await rows.execute(whole)}
        return held | {row.stored: sealed_size(row.size) for row in await rows.execute(made)}


async def _leave_out_deleted(live: Database, copy: Database, absent: set[str]) -> int:
    """Takes from the copy what the store no longer has; how many contents the store has rows of, and no bytes."""
    gone_files = await _gone(live, copy, files)
    gone_contents = await _gone(live, copy, blobs)
    gone_archives = await _gone(live, copy, archives)
    async with copy.writing() as out:
        for ids in _batches(gone_files):
            await out.execute(delete(derived).where(derived.c.owner.in_(ids)))
            await out.execute(delete(files).where(files.c.id.in_(ids)))
        for ids in _batches(gone_contents):
            await out.execute(delete(derived).where(derived.c.owner.in_(ids)))
            # Files that are there still, without their content, have expired.
            expired = update(files).where(files.c.blob_id.in_(ids))
            await out.execute(expired.values(blob_id=None, expired_at=func.coalesce(files.c.expires_at, files.c.created_at)))
            await out.execute(delete(blobs).where(blobs.c.id.in_(ids)))
        for names in _batches(absent):  # what was made from a file can be made again
            await out.execute(delete(derived).where(derived.c.place == "blobs", derived.c.stored.in_(names)))
        for ids in _batches(gone_archives):
            await out.execute(delete(archives).where(archives.c.id.in_(ids)))
        await out.execute(delete(archives).where(archives.c.size.is_(None)))  # on its way
        there = select(archives.c.id)
        await out.execute(delete(derived).where(derived.c.place == ARCHIVES, derived.c.stored.not_in(there)))
        refs = select(func.count()).where(files.c.blob_id == blobs.c.id).scalar_subquery()
        await out.execute(update(blobs).values(refs=refs))
        await out.execute(delete(blobs).where(blobs.c.refs == 0))
        await _count_usage(out)
    kept = await _names(copy)
    return len(absent & kept.keys())


async def _gone(live: Database, copy: Database, table: Table) -> list[str]:
    """Ids that the copy has and the store has no more."""
    async with copy.reading() as rows:
        ids = list((await rows.execute(select(table.c.id))).scalars())
    gone: list[str] = []
    for part in _batches(ids):
        async with live.reading() as rows:
            there = set((await rows.execute(select(table.c.id).where(table.c.id.in_(part)))).scalars())
        gone += [id for id in part if id not in there]
    return gone


async def _count_usage(out: AsyncConnection) -> None:
    """Counters equal to the sums over the rows; nothing is under way in a backup, so nothing is reserved."""
    await out.execute(update(usage).values(used_bytes=0, used_files=0, reserved_bytes=0, reserved_files=0))
    held = select(workspaces.c.organization_id, files.c.workspace_id, files.c.key_id, files.c.user_id)
    sums = held.add_columns(func.sum(files.c.size), func.count()).join(workspaces, workspaces.c.id == files.c.workspace_id)
    grouped = sums.where(files.c.expired_at.is_(None)).group_by(*held.selected_columns)
    owner = (archives.c.organization_id, archives.c.workspace_id, archives.c.key_id, archives.c.user_id)
    kept = select(*owner, func.sum(archives.c.size), literal(0)).group_by(*owner)
    for organization_id, workspace_id, key_id, user_id, size, count in [
        *(await out.execute(grouped)).all(),
        *(await out.execute(kept)).all(),
    ]:
        for scope, id in quotas.scopes(Caller(organization_id, workspace_id, key_id, user_id)):
            at = update(usage).where(usage.c.scope == scope, usage.c.id == id)
            await out.execute(at.values(used_bytes=usage.c.used_bytes + size, used_files=usage.c.used_files + count))


# -- bytes


async def _copy_bytes(source: Blobs, target: Blobs, wanted: dict[str, int], progress: Progress | None) -> tuple[int, set[str]]:
    """Copies what the target lacks; how many that were, and the names that the source does not have."""
    there = set(await asyncio.to_thread(lambda: set(target.names())))
    absent: set[str] = set()
    copied = 0

    def copy(name: str, size: int) -> bool:
        if name in there and target.size(name) == size:
            return False
        if name in there:  # cut short by something other than us; published bytes are never written over
            target.erase(name)
        target.discard(name)
        staged = target.stage(name)
        try:
            for start in range(0, size, PIECE):
                piece = source.read(name, start, min(PIECE, size - start))
                if not piece:  # shorter than its row says
                    raise FileNotFoundError(name)
                staged.write(piece)
                if progress:
                    progress(len(piece))
            staged.publish(name)
        except FileNotFoundError:
            absent.add(name)
            return False
        finally:
            staged.discard()
        return True

    rest = iter(wanted.items())

    async def carry() -> None:
        nonlocal copied
        for name, size in rest:
            was_new = await asyncio.to_thread(copy, name, size)
            copied += was_new

    await asyncio.gather(*(carry() for _ in range(AT_ONCE)))
    return copied, absent


# -- places


def _is_fit(settings: Settings, folder: Path) -> None:
    if folder.resolve() == settings.data.expanduser().resolve():
        raise BadInput(f"'{folder}' is the store's own folder; name another one, best on another disk")
    if (folder / ROWS).exists() and not (folder / MARK).exists():
        raise BadInput(f"'{folder}' holds a store and no backup; name an empty folder, or one with an older backup")


def _replace(fresh: Path, folder: Path, report: BackupReport) -> None:
    """The new rows take the place of the old ones, and the mark follows; each whole or not there."""
    mark = folder / f"{MARK}.new"
    try:
        mark.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        for path in (fresh, mark):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        _remove_database(folder / ROWS, only_log=True)  # a log that is left of the old rows must not be read into the new ones
        os.replace(fresh, folder / ROWS)
        os.replace(mark, folder / MARK)
        sync_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot finish the backup in '{folder}': {error.strerror or error}") from error


def _remove_database(path: Path, *, only_log: bool = False) -> None:
    for end in ("-wal", "-shm") if only_log else ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Database]:
    database = await Database.open(url)
    try:
        yield database
    finally:
        await database.close()


def _batches(items: Iterable[str]) -> list[list[str]]:
    every = list(items)
    return [every[start : start + BATCH] for start in range(0, len(every), BATCH)]
