"""The tables of a database are those of this version, whichever version it was made by."""

import asyncio

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

import ropewalk.files.tables
import ropewalk.tenants.tables  # noqa: F401
from ropewalk.database import MIGRATIONS, Database, _engine, metadata, upgrade
from ropewalk.errors import BadInput, OutputError

VERSIONS = sorted(path.stem for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/a.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


async def upgraded(url, to):
    database = Database(_engine(url))
    async with database.writing() as connection:
        await connection.run_sync(lambda inner: upgrade(inner, to))
    return database


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_of_every_version_are_there_after_the_upgrade(url, version):
    async def body():
        database = await upgraded(url, version)
        async with database.writing() as connection:
            await connection.execute(text("INSERT INTO organizations VALUES ('org_1', 'default', 7)"))
        await database.close()
        database = await Database.open(url)
        async with database.reading() as connection:
            assert (await connection.execute(text("SELECT name FROM organizations"))).scalar() == "default"
        async with database.writing() as connection:
            assert await connection.run_sync(lambda inner: compare_metadata(MigrationContext.configure(inner), metadata)) == []
        await database.close()

    asyncio.run(body())


def test_processes_that_start_at_once_upgrade_once(url):
    async def body():
        for database in await asyncio.gather(*(Database.open(url) for _ in range(4))):
            await database.close()

    asyncio.run(body())


def test_a_block_that_raises_leaves_nothing(url):
    async def body():
        database = await Database.open(url)
        with pytest.raises(KeyError):  # noqa: PT012
            async with database.writing() as connection:
                await connection.execute(text("INSERT INTO organizations VALUES ('org_1', 'default', 7)"))
                raise KeyError
        async with database.reading() as connection:
            assert (await connection.execute(text("SELECT count(*) FROM organizations"))).scalar() == 0
        await database.close()

    asyncio.run(body())


def test_a_writer_that_is_cancelled_leaves_the_database_usable(url):
    async def body():
        database = await Database.open(url)

        async def slow(name):
            async with database.writing() as connection:
                await connection.execute(text(f"INSERT INTO organizations VALUES ('{name}', 'default', 7)"))
                await asyncio.sleep(0.05 if name == "org_1" else 0)

        first = asyncio.create_task(slow("org_1"))
        await asyncio.sleep(0.02)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await slow("org_2")
        async with database.reading() as connection:
            assert (await connection.execute(text("SELECT id FROM organizations"))).scalars().all() == ["org_2"]
        await database.close()

    asyncio.run(body())


def test_an_sqlite_commit_is_synced_and_what_is_deleted_is_overwritten(tmp_path):
    async def body():
        database = await Database.open(f"sqlite:///{tmp_path}/a.db")
        async with database.writing() as connection:
            for pragma, value in (("synchronous", 2), ("secure_delete", 1), ("foreign_keys", 1), ("journal_mode", "wal")):
                assert (await connection.execute(text(f"PRAGMA {pragma}"))).scalar() == value
        await database.close()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("mysql://host/x", BadInput, "expected sqlite"),
        ("nonsense", BadInput, "no URL"),
        ("postgresql+asyncpg://user:hidden@127.0.0.1:1/x", BadInput, "cannot reach"),
        ("sqlite:////proc/none/a.db", OutputError, "cannot write"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_without_its_password(url, error, says):
    with pytest.raises(error, match=says) as told:
        asyncio.run(Database.open(url))
    assert "hidden" not in str(told.value)
