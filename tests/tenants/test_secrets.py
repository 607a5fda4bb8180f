"""The store's secrets under another root key."""

import asyncio

import pytest
from sqlalchemy import select

from ropewalk.database import Database
from ropewalk.errors import BadInput
from ropewalk.tenants.keys import authenticate, create_key
from ropewalk.tenants.secrets import NAMES, open_secret, rotate_root, signing_key
from ropewalk.tenants.tables import secrets, workspaces
from ropewalk.tenants.workspaces import (
    archive_workspace,
    create_workspace,
    destroy_workspace_key,
    ensure_default,
    workspace_key,
)
from ropewalk.vault import Vault

OTHER = Vault(b"another root key, 32 bytes long!")


def test_after_a_rotation_only_the_new_root_key_opens_the_store_and_it_opens_the_same(tell):
    async def story(database, vault):
        acme, gone = [await create_workspace(database, vault, name) for name in ("acme", "gone")]
        await archive_workspace(database, gone.id)
        await destroy_workspace_key(database, gone.id)
        _, secret = await create_key(database, vault, acme.id, "laptop")

        async def inner(root):
            async with database.reading() as connection:
                return [await open_secret(connection, root, name) for name in NAMES] + [
                    await workspace_key(connection, root, acme.id),
                    (await signing_key(connection, root)).private_bytes_raw(),
                ]

        before = await inner(vault)
        assert await rotate_root(database, vault, OTHER) == 6  # four secrets, 'default' and 'acme'
        assert await inner(OTHER) == before
        with pytest.raises(BadInput, match="does not open this store"):
            await ensure_default(database, vault)
        with pytest.raises(BadInput, match="does not open this store"):
            await create_workspace(database, vault, "late")  # a process that still holds the old root key
        assert (await ensure_default(database, OTHER)).name == "default"
        async with database.reading() as connection:
            assert await authenticate(connection, before[1], secret) is not None

    tell(story)


def test_a_rotation_by_a_root_key_that_is_not_the_stores_changes_nothing(tell):
    async def story(database, vault):
        with pytest.raises(BadInput, match="does not open this store"):
            await rotate_root(database, OTHER, Vault(bytes(32)))
        assert (await ensure_default(database, vault)).name == "default"

    tell(story)


def test_workspaces_made_during_a_rotation_open_with_the_new_root_key(url):
    vault = Vault(bytes(32))

    async def story():
        one, other = await Database.open(url), await Database.open(url)
        await ensure_default(one, vault)
        made = await asyncio.gather(
            *(create_workspace(one, vault, f"early{i}") for i in range(4)),
            rotate_root(other, vault, OTHER),
            *(create_workspace(one, vault, f"late{i}") for i in range(4)),
            return_exceptions=True,
        )
        workspaces = [one for one in made if not isinstance(one, int | BaseException)]
        refused = [one for one in made if isinstance(one, BaseException)]
        assert all("does not open this store" in str(error) for error in refused)
        assert len(workspaces) + len(refused) == 8
        async with one.reading() as connection:
            for workspace in workspaces:
                await workspace_key(connection, OTHER, workspace.id)
        await one.close()
        await other.close()

    asyncio.run(story())


def test_a_rotation_leaves_no_key_wrapped_by_the_old_root_in_the_files(tmp_path):
    vault = Vault(bytes(32))

    async def story():
        database = await Database.open(f"sqlite:///{tmp_path / 'ropewalk.db'}")
        await ensure_default(database, vault)
        async with database.reading() as connection:
            before = (await connection.execute(select(secrets.c.sealed))).scalars().all()
            before += (await connection.execute(select(workspaces.c.sealed_key))).scalars().all()
        await rotate_root(database, vault, OTHER)
        kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        await database.close()
        return before, kept

    before, kept = asyncio.run(story())
    assert len(before) == 5
    assert [sealed for sealed in before if sealed in kept] == []
