"""A store to keep comparisons in, on each kind of database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

Body = Callable[[Store, Caller], Awaitable[None]]


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """SQLite, and PostgreSQL."""
    if request.param == "sqlite":
        return Settings(data=tmp_path / "data")
    return Settings(data=tmp_path / "data", database_url=request.getfixturevalue("postgres_url"))


@pytest.fixture
def opened(settings: Settings) -> Callable[[Body], None]:
    """Runs a test's body with an open store and a caller of its default workspace."""

    def run(body: Body) -> None:
        async def whole() -> None:
            store = await Store.open(settings)
            try:
                await body(store, await store.local_caller())
            finally:
                await store.close()

        asyncio.run(whole())

    return run
