"""The one door to SQL: SQLite in the data folder by default, PostgreSQL by URL. Tables lie with the modules that own them.

A transaction that writes is durable when its block ends: SQLite runs with `synchronous=FULL`, which syncs at each commit
(https://sqlite.org/pragma.html#pragma_synchronous), and overwrites what is deleted (`secure_delete`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, Table, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ropewalk.errors import BadInput, MissingExtra, OutputError

metadata = MetaData()

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_MILLISECONDS = 30_000
POOL = 12  # connections of one process


def now() -> int:
    """Microseconds since the epoch, UTC: every time in the database."""
    return int(time.time() * 1_000_000)


class Database:
    """A pool of connections to a database whose tables are those of this version."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.dialect = engine.dialect.name
        # SQLite has one writer: waiting here costs nothing, waiting there is polling.
        self._turn: AbstractAsyncContextManager[Any] = asyncio.Lock() if self.dialect == "sqlite" else nullcontext()

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connects, and brings the tables to this version: `sqlite+aiosqlite:///PATH` or `postgresql+asyncpg://...`."""
        database = cls(_engine(url))
        try:
            await database._migrate()
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

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only looks: one moment in time, and no waiting for writers."""
        async with self._engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is durable when the block ends, and undone when the block raises."""
        async with self._turn, self._engine.execution_options(writes=True).begin() as connection:
            yield connection

    async def close(self) -> None:
        await self._engine.dispose()

    def upsert(self, table: Table) -> Any:
        """An INSERT that knows `on_conflict_do_update` and `on_conflict_do_nothing`."""
        return (sqlite.insert if self.dialect == "sqlite" else postgresql.insert)(table)

    async def forget(self) -> None:
        """Erases what deleted rows may have left beside the tables: SQLite's log of changes."""
        if self.dialect == "sqlite":
            async with self._turn, self._engine.connect() as connection:
                raw = await connection.get_raw_connection()
                driver: Any = raw.driver_connection
                # Readers at work keep parts of the log in use; the next sweep tries again, writers need not wait for them here.
                await driver.execute("PRAGMA busy_timeout=200")
                await driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                await driver.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")

    async def _migrate(self) -> None:
        async with self._turn, self._engine.execution_options(writes=True).begin() as connection:
            if self.dialect == "postgresql":  # servers that start at once take turns
                await connection.execute(text("SELECT pg_advisory_xact_lock(7263451)"))
            await connection.run_sync(upgrade)


def upgrade(connection: Connection, to: str = "head") -> None:
    """Applies the migrations that this database has not seen."""
    newest = max(path.stem for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))
    if to == "head" and _version(connection) == newest:  # Alembic is slow to import
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _version(connection: Connection) -> str | None:
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _engine(url: str) -> AsyncEngine:
    try:
        parsed = make_url(url)
        if parsed.drivername == "sqlite+aiosqlite":
            if parsed.database:
                _private_folder(Path(parsed.database).parent)
            engine = create_async_engine(parsed, pool_size=POOL, max_overflow=0, pool_timeout=60)
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
        f"'{_shown(url)}' is no URL of a database that can be used; expected sqlite+aiosqlite:///PATH or postgresql+asyncpg://HOST/NAME"
    )


def _prepare_sqlite(engine: AsyncEngine) -> None:
    @event.listens_for(engine.sync_engine, "connect")
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

    @event.listens_for(engine.sync_engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


def _private_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
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
