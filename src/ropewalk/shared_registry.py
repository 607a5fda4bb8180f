"""The registry of servers that share a database: what is published and shipped at one of them is so at all, at once.

Its state is one row. Folders below a server's data folder are written relative to it, so that `jobs/ID/run/adapter` is each server's own;
any other folder has to lie at the same place on every machine.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import JSON, Column, Integer, Table, select, update

from ropewalk.database import Database, metadata
from ropewalk.registry import Registry

T = TypeVar("T")
ROW = 1

registry = Table(
    "registry",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # ROW
    Column("state", JSON, nullable=False),  # as registry.json
)


def open_registry(data: Path, database_url: str | None) -> Registry:
    """Of one machine: a file in the data folder. Of all that share a PostgreSQL: a row in it."""
    folder = data.expanduser() / "registry"
    if database_url is not None and database_url.startswith("postgresql"):
        return SharedRegistry(database_url, folder)
    return Registry(folder)


class SharedRegistry(Registry):
    """The same over a database; it asks from a thread of its own, so that whoever asks need not be a coroutine."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(folder)
        self._url, self._data = url, folder.parent.resolve()
        self._opening = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._database: Database | None = None
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        with self._opening:
            if self._loop is not None and self._database is not None and self._thread is not None:
                _in(self._loop, self._database.close())
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                atexit.unregister(self.close)
            self._loop = self._database = self._thread = None

    def _read(self) -> dict[str, Any]:
        async def read(database: Database) -> dict[str, Any]:
            async with database.reading() as connection:
                return _state((await connection.execute(select(registry.c.state))).scalar_one())

        return self._ask(read)

    @contextmanager
    def _change(self) -> Iterator[dict[str, Any]]:
        """The state, under the lock of its row; written back when the block ends without an error."""
        turn = _Turn()
        state = self._ask(turn.begin)
        try:
            yield state
        except BaseException as error:
            self._ask(partial(turn.undo, error))
            raise
        self._ask(partial(turn.commit, state))

    def _kept_as(self, path: Path) -> str:
        return str(path.relative_to(self._data)) if path.is_relative_to(self._data) else str(path)

    def _lies_at(self, path: str) -> str:
        return str(self._data / path)  # an absolute path stays what it is

    def _ask(self, work: Callable[[Database], Awaitable[T]]) -> T:
        async def answer() -> T:
            assert self._database is not None
            return await work(self._database)

        return asyncio.run_coroutine_threadsafe(answer(), self._opened()).result()

    def _opened(self) -> asyncio.AbstractEventLoop:
        with self._opening:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(loop,), name="registry", daemon=True)
                self._thread.start()
                try:
                    self._database = _in(loop, self._open())
                except BaseException:
                    loop.call_soon_threadsafe(loop.stop)
                    raise
                self._loop = loop
                atexit.register(self.close)  # a command ends without a word to it
            return self._loop

    async def _open(self) -> Database:
        database = await Database.open(self._url)
        # Before there was a shared one, this server's file may have known models: the first server's are everybody's.
        state = super()._read()
        for entry in state["entries"].values():
            entry["path"] = self._kept_as(Path(entry["path"]))
        try:
            async with database.writing() as connection:
                new = database.upsert(registry).values(id=ROW, state=state).on_conflict_do_nothing()
                await connection.execute(new)
        except BaseException:
            await database.close()
            raise
        return database


class _Turn:
    """One change: a transaction that is open from `begin` to `commit` or `undo`."""

    async def begin(self, database: Database) -> dict[str, Any]:
        self._block = database.writing()
        self._connection = await self._block.__aenter__()
        try:
            row = await self._connection.execute(select(registry.c.state).where(registry.c.id == ROW).with_for_update())
            return _state(row.scalar_one())
        except BaseException as error:
            await self._block.__aexit__(type(error), error, error.__traceback__)
            raise

    async def commit(self, state: dict[str, Any], _: Database) -> None:
        await self._connection.execute(update(registry).where(registry.c.id == ROW).values(state=state))
        await self._block.__aexit__(None, None, None)

    async def undo(self, error: BaseException, _: Database) -> None:
        await self._block.__aexit__(type(error), error, error.__traceback__)


def _state(found: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(found) if isinstance(found, str) else found
    return state


def _in(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, loop).result()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()
