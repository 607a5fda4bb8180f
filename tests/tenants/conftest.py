"""An empty store's database, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ropewalk.database import Database
from ropewalk.tenants.workspaces import ensure_default
from ropewalk.vault import Vault

VAULT = Vault(bytes(range(32)))
Story = Callable[[Database, Vault], Awaitable[Any]]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ropewalk.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def tell(url: str) -> Callable[[Story], Any]:
    """Runs a story on an open database that has had its first start."""

    def run(story: Story) -> Any:
        async def whole() -> Any:
            database = await Database.open(url)
            try:
                await ensure_default(database, VAULT)
                return await story(database, VAULT)
            finally:
                await database.close()

        return asyncio.run(whole())

    return run
