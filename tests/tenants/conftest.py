"""An empty store's database, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ropewalk.database import Database
from ropewalk.tenants.workspaces import ensure_default
from ropewalk.vault import Vault

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

VAULT = Vault(bytes(range(32)))
Story = Callable[[Database, Vault], Awaitable[Any]]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    from backends import postgres, postgres_binaries

    if postgres_binaries() is None:
        pytest.skip("no PostgreSQL on this machine, neither the wheel pgserver nor a package of the system")
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ropewalk.db'}"
    return request.getfixturevalue("postgres_server").new_database()


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
