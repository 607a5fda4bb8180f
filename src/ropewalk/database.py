"""The one door to SQL: SQLite in the data folder by default, PostgreSQL by URL. Tables lie with the modules that own them.

A transaction that writes is durable when its block ends: SQLite runs with `synchronous=FULL`, which syncs at each commit
(https://sqlite.org/pragma.html#pragma_synchronous), and overwrites what is deleted (`secure_delete`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, CursorResult, Engine, MetaData, ScalarResult, Table, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ropewalk.errors import BadInput, MissingExtra, OutputError
from ropewalk.folders import make_folder

metadata = MetaData()
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_MILLISECONDS = 30_000
POOL = 12  # connections of one process


def now() -> int:
    """Microseconds since the epoch, UTC: every time in the database."""
    return int(time.time() * 1_000_000)


def timestamp(microseconds: int) -> str:
    """A time of the database as RFC 3339, to the microsecond."""
    return (EPOCH + timedelta(microseconds=microseconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Database:
    """A pool of connections to a database whose tables are those of this version."""

    def __init__(self, engine: Engine | AsyncEngine) -> None:
        self._engine = engine
        self.dialect = engine.dialect.name
        self._turn = asyncio.Lock()  # SQLite has one writer: waiting here costs nothing, waiting there is polling

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connects, and brings the tables to this version: `sqlite:///PATH` or `postgresql+asyncpg://...`."""
        database = cls(_engine(url))
        try:
            async with database.writing() as connection:
                if database.dialect == "postgresql":  # servers that start at once take turns
                    await connection.execute(text("SELECT pg_advisory_xact_lock(7263451)"))
                await connection.run_sync(upgrade)
        except OSError as error:
            await database.close()
            raise BadInput(f"cannot reach the database {_shown(url)}: {error}") from error
        except OperationalError as error:
            await database.close()
            raise OutputError(f"cannot open the database {_shown(url)}: {error.orig}") from error
        except BaseException:
            await database.close()
            raise
        return database

    @classmethod
    @asynccontextmanager
    async def unprepared(cls, url: str) -> AsyncIterator[Database]:
        """A database as it is found, whatever its tables: to look at, for as long as the block lasts."""
        database = cls(_engine(url))
        try:
            yield database
        finally:
            await database.close()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only looks: one moment in time, and no waiting for writers."""
        if isinstance(self._engine, Engine):
            with self._engine.connect() as here:
                yield cast(AsyncConnection, _Immediate(here))
        else:
            async with self._engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is durable when the block ends, and undone when the block raises."""
        if isinstance(self._engine, Engine):
            async with self._turn:
                with self._engine.execution_options(writes=True).connect() as here:
                    await _in_thread(here.begin)  # waits for other processes
                    yield cast(AsyncConnection, _Immediate(here))
                    await _in_thread(here.commit)  # waits for the disk
        else:
            async with self._engine.begin() as connection:
                yield connection

    async def close(self) -> None:
        if isinstance(self._engine, Engine):
            self._engine.dispose()
        else:
            await self._engine.dispose()

    def upsert(self, table: Table) -> Any:
        """An INSERT that knows `on_conflict_do_update` and `on_conflict_do_nothing`."""
        return (sqlite.insert if self.dialect == "sqlite" else postgresql.insert)(table)

    async def forget(self) -> None:
        """Erases what deleted rows may have left beside the tables: SQLite's log of changes."""
        if isinstance(self._engine, Engine):
            async with self._turn:
                await _in_thread(self._forget)

    def _forget(self) -> None:
        assert isinstance(self._engine, Engine)
        raw = self._engine.raw_connection()
        try:
            cursor = raw.cursor()
            # Readers at work keep parts of the log in use; the next sweep tries again, writers need not wait for them here.
            for pragma in ("busy_timeout=200", "wal_checkpoint(TRUNCATE)", f"busy_timeout={BUSY_MILLISECONDS}"):
                cursor.execute(f"PRAGMA {pragma}")
                cursor.fetchall()
            cursor.close()
        finally:
            raw.close()


class _Immediate:
    """What we need of an AsyncConnection, on this thread: SQLite has answered before another thread would have had its turn."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self.dialect = connection, connection.dialect

    async def execute(self, *statement: Any) -> CursorResult[Any]:
        return self._connection.execute(*statement)

    async def scalar(self, *statement: Any) -> Any:
        return self._connection.scalar(*statement)

    async def scalars(self, *statement: Any) -> ScalarResult[Any]:
        return self._connection.scalars(*statement)

    async def run_sync(self, function: Callable[[Connection], Any]) -> Any:
        return function(self._connection)


async def _in_thread(work: Callable[[], Any]) -> None:
    """Runs in a thread, to its end even if nobody waits for it any more: half a commit is none of ours to leave."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def upgrade(connection: Connection, to: str = "head") -> None:
    """Applies the migrations that this database has not seen."""
    if to == "head" and version_at(connection) == newest_migration():  # Alembic is slow to import
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def newest_migration() -> str:
    """The last that this version knows."""
    return max(path.stem for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def version_at(connection: Connection) -> str | None:
    """The last migration that this database has seen; None where it has no tables of ours."""
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _engine(url: str) -> Engine | AsyncEngine:
    try:
        parsed = make_url(url)
        if parsed.drivername == "sqlite" and parsed.database:
            _private_folder(Path(parsed.database).parent)
            # Never waits for a connection of the pool: that would stop the loop that is to give one back.
            engine = create_engine(parsed, pool_size=POOL, max_overflow=-1, connect_args={"check_same_thread": False})
            _prepare_sqlite(engine)
            return engine
        if parsed.drivername == "postgresql+asyncpg":
            return create_async_engine(
                parsed, pool_size=POOL, max_overflow=0, pool_pre_ping=True, isolation_level="READ COMMITTED"
            )
    except (ArgumentError, NoSuchModuleError) as error:
        raise BadInput(f"'{_shown(url)}' is no URL of a database: {error}") from error
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "asyncpg", "postgres", f"the database {_shown(url)}") from error
    raise BadInput(
        f"'{_shown(url)}' is no URL of a database that can be used; expected sqlite:///PATH or postgresql+asyncpg://HOST/NAME"
    )


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        # Transactions are begun below; the driver's own would be begun too late, at the first change.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={BUSY_MILLISECONDS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "secure_delete=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


def _private_folder(folder: Path) -> None:
    try:
        make_folder(folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}; name another folder with --data or ROPEWALK_HOME"
        ) from error


def _shown(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url
