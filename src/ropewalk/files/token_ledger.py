"""What questions cost, written down: sums by day, model and user of a workspace, and by file.

A question waits for no disk: sums gather in memory, are written in one transaction, and for PAUSE seconds after it gather again. A
process that is killed loses what it gathered since.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Table, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import Database, now
from ropewalk.files.tables import file_token_days, files
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import storage_days, token_days
from ropewalk.tenants.tables import usage as quotas

PAUSE = 1.0
ROWS = 200  # of one statement

Key = tuple[str, ...]
log = logging.getLogger("ropewalk.tokens")


@dataclass(frozen=True)
class Spent:
    """The tokens of one request."""

    input: int = 0
    cache_creation: int = 0
    cache_read: int = 0
    output: int = 0


@dataclass(frozen=True)
class FileTokens:
    """What questions about a file cost, and did not."""

    questions: int = 0
    cache_creation: int = 0
    cache_read: int = 0


class TokenLedger:
    """Adds up what one process's questions cost."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._days: dict[Key, list[int]] = {}
        self._files: dict[Key, list[int]] = {}
        self._writing: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    def add(self, caller: Caller, model: str, spent: Spent, of_files: Mapping[str, FileTokens]) -> None:
        """One request more; `of_files`, by id, are the shares of the stored files that it was about."""
        day = today()
        counts = [1, spent.input, spent.cache_creation, spent.cache_read, spent.output]
        _gather(self._days, (caller.workspace_id, day, model, caller.user_id or ""), counts)
        for id, share in of_files.items():
            _gather(self._files, (id, day, model), [share.questions, share.cache_creation, share.cache_read])
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def flush(self) -> None:
        """Returns when all that was added is in the database."""
        # To its end even if nobody waits any more: what is half committed would be added twice.
        await asyncio.shield(asyncio.ensure_future(self._flush()))

    async def _flush(self) -> None:
        async with self._turn:
            days, self._days = self._days, {}
            of_files, self._files = self._files, {}
            if not days and not of_files:
                return
            try:
                async with self._database.writing() as connection:
                    alive = await _alive(connection, {id for id, *_ in of_files})
                    kept = {key: counts for key, counts in of_files.items() if key[0] in alive}
                    await _add(self._database, connection, file_token_days, kept)
                    await _add(self._database, connection, token_days, days)
            except Exception:
                for gathered, taken in ((self._days, days), (self._files, of_files)):
                    for key, counts in taken.items():
                        _gather(gathered, key, counts)
                raise

    async def close(self) -> None:
        """Writes what is left."""
        if self._writing is not None:
            self._writing.cancel()
            with suppress(asyncio.CancelledError):
                await self._writing
        await self.flush()

    async def _write(self) -> None:
        while self._days or self._files:
            try:
                await self.flush()
            except (
                Exception
            ) as error:  # the database is busy, or gone for a moment: it is tried again with what comes meanwhile
                log.warning("what questions cost cannot be written down yet: %s", type(error).__name__)
            await asyncio.sleep(PAUSE)


async def of_files(database: Database, ids: Sequence[str]) -> dict[str, dict[str, FileTokens]]:
    """By file, and then by model, what questions cost; files that nobody asked about are left out."""
    table, found = file_token_days, dict[str, dict[str, FileTokens]]()
    sums = [func.sum(table.c[name]).label(name) for name in ("questions", "cache_creation", "cache_read")]
    query = select(table.c.file_id, table.c.model, *sums).where(table.c.file_id.in_(ids))
    async with database.reading() as connection:
        for row in await connection.execute(query.group_by(table.c.file_id, table.c.model).order_by(table.c.model)):
            tokens = FileTokens(int(row.questions), int(row.cache_creation), int(row.cache_read))
            found.setdefault(row.file_id, {})[row.model] = tokens
    return found


async def sample_storage(database: Database) -> int:
    """Writes down what workspaces have stored today, where that is more than what was seen before; how many those are."""
    table, day = storage_days, today()
    on_day = (table.c.workspace_id == quotas.c.id) & (table.c.day == day)
    query = select(quotas.c.id, quotas.c.used_bytes).select_from(quotas.outerjoin(table, on_day))
    grown = (quotas.c.scope == "workspace") & (quotas.c.used_bytes > func.coalesce(table.c.used_bytes, 0))
    async with database.reading() as connection:
        rows = (await connection.execute(query.where(grown).order_by(quotas.c.id))).all()
    if not rows:
        return 0
    async with database.writing() as connection:
        for start in range(0, len(rows), ROWS):
            values = [{"workspace_id": row.id, "day": day, "used_bytes": row.used_bytes} for row in rows[start : start + ROWS]]
            insert = database.upsert(table).values(values)
            most = {"used_bytes": insert.excluded.used_bytes}
            smaller = table.c.used_bytes < insert.excluded.used_bytes  # than what another process has seen
            await connection.execute(
                insert.on_conflict_do_update(index_elements=["workspace_id", "day"], set_=most, where=smaller)
            )
    return len(rows)


def today() -> str:
    """The day, UTC."""
    return datetime.fromtimestamp(now() / 1e6, UTC).date().isoformat()


def _gather(sums: dict[Key, list[int]], key: Key, counts: Iterable[int]) -> None:
    old = sums.get(key)
    sums[key] = list(counts) if old is None else [a + b for a, b in zip(old, counts, strict=True)]


async def _alive(connection: AsyncConnection, ids: set[str]) -> set[str]:
    """Those of these files that are still there, and stay as long as the transaction lasts."""
    found, wanted = set[str](), sorted(ids)
    for start in range(0, len(wanted), ROWS):
        query = select(files.c.id).where(files.c.id.in_(wanted[start : start + ROWS])).order_by(files.c.id)
        found |= set((await connection.execute(query.with_for_update(read=True, key_share=True))).scalars())
    return found


async def _add(database: Database, connection: AsyncConnection, table: Table, sums: Mapping[Key, Sequence[int]]) -> None:
    keys = [column.name for column in table.primary_key]
    counters = [column.name for column in table.c if column.name not in keys]
    rows: list[dict[str, Any]] = [
        dict(zip((*keys, *counters), (*key, *counts), strict=True))
        for key, counts in sorted(sums.items())  # the same order in all processes
    ]
    for start in range(0, len(rows), ROWS):
        insert = database.upsert(table).values(rows[start : start + ROWS])
        added = {name: table.c[name] + insert.excluded[name] for name in counters}
        await connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=added))
