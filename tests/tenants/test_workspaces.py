"""Workspaces: made once, listed in pages, closed for good."""

import asyncio

import pytest

from ropewalk.database import Database
from ropewalk.errors import BadInput, NotFound
from ropewalk.tenants import audit
from ropewalk.tenants.keys import authenticate, create_key
from ropewalk.tenants.quotas import set_limit, usage
from ropewalk.tenants.secrets import open_secret
from ropewalk.tenants.workspaces import (
    archive_workspace,
    change_workspace,
    create_workspace,
    destroy_workspace_key,
    ensure_default,
    find_workspace,
    list_workspaces,
    organization,
    workspace_key,
)
from ropewalk.vault import Vault


def test_processes_that_start_at_once_agree_on_everything(url):
    vault = Vault(bytes(32))

    async def start():
        databases = await asyncio.gather(*(Database.open(url) for _ in range(6)))
        found = await asyncio.gather(*(ensure_default(database, vault) for database in databases))
        async with databases[0].reading() as connection:
            peppers = {await open_secret(connection, vault, "pepper") for _ in range(2)}
        report = await audit.verify(databases[0])
        for database in databases:
            await database.close()
        return found, peppers, report

    found, peppers, report = asyncio.run(start())
    assert len({workspace.id for workspace in found}) == 1
    assert len(peppers) == 1
    assert report.entries == 1  # one workspace_created
    assert report.faults == ()


def test_another_root_key_is_told_at_once(tell):
    async def story(database, vault):
        with pytest.raises(BadInput, match=r"the root key does not open this store.*\$ROPEWALK_ROOT_KEY_FILE"):
            await ensure_default(database, Vault(b"another root key, 32 bytes long!"))

    tell(story)


def test_a_workspace_under_another_root_key_is_never_made(tell):
    async def story(database, vault):
        with pytest.raises(BadInput, match="does not open this store"):
            await create_workspace(database, Vault(b"another root key, 32 bytes long!"), "acme")
        return await list_workspaces(database)

    assert [workspace.name for workspace in tell(story).items] == ["default"]


def test_every_workspace_has_a_key_of_its_own(tell):
    async def story(database, vault):
        acme = await create_workspace(database, vault, "acme")
        async with database.reading() as connection:
            default = await find_workspace(connection, "default")
            return [await workspace_key(connection, vault, id) for id in (acme.id, acme.id, default.id)]

    first, again, other = tell(story)
    assert first == again != other
    assert len(first) == 32


def test_two_thousand_workspaces_are_listed_page_by_page(tell):
    async def story(database, vault):
        from sqlalchemy import insert

        from ropewalk.tenants.tables import workspaces

        async with database.writing() as connection:
            organization_id, _ = await organization(connection)
            # Times repeat, so that the order within one instant matters too.
            rows = [
                {"id": f"wrkspc_{i:05}", "organization_id": organization_id, "name": f"w{i}", "created_at": 1000 + i // 7}
                for i in range(2000)
            ]
            await connection.execute(insert(workspaces), rows)
        seen, after = [], None
        while True:
            page = await list_workspaces(database, limit=300, after_id=after)
            seen += page.items
            if not page.more:
                break
            after = page.items[-1].id
        back = await list_workspaces(database, limit=300, before_id=seen[300].id)
        return seen, back

    seen, back = tell(story)
    assert len(seen) == len({workspace.id for workspace in seen}) == 2001
    assert [w.created_at for w in seen] == sorted((w.created_at for w in seen), reverse=True)
    assert back.items == seen[:300]
    assert not back.more


def test_a_list_refuses_two_cursors_and_one_that_it_does_not_hold(tell):
    async def story(database, vault):
        with pytest.raises(BadInput, match="both given"):
            await list_workspaces(database, after_id="a", before_id="b")
        with pytest.raises(BadInput, match="'wrkspc_none' is no id in this list"):
            await list_workspaces(database, after_id="wrkspc_none")
        with pytest.raises(BadInput, match="expected 1 to 1000"):
            await list_workspaces(database, limit=1001)

    tell(story)


def test_two_who_want_one_name_do_not_both_get_it(tell):
    async def story(database, vault):
        made = await asyncio.gather(*(create_workspace(database, vault, "acme") for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(one, BadInput) and "is taken" in str(one) for one in made) == 4

    tell(story)


def test_archiving_ends_the_keys_and_keeps_the_workspace_findable(tell):
    async def story(database, vault):
        acme = await create_workspace(database, vault, "acme")
        _, secret = await create_key(database, vault, acme.id, "laptop")
        async with database.reading() as connection:
            pepper = await open_secret(connection, vault, "pepper")
            assert await authenticate(connection, pepper, secret) is not None
        archived = await archive_workspace(database, "acme")
        again = await archive_workspace(database, acme.id)
        async with database.reading() as connection:
            assert await authenticate(connection, pepper, secret) is None
            assert await find_workspace(connection, acme.id) == archived == again
        with pytest.raises(BadInput, match="would open nothing"):
            await create_key(database, vault, acme.id, "another")
        with pytest.raises(BadInput, match="archived, for good"):
            await change_workspace(database, acme.id, {"requests_per_minute": 5})
        shown = await list_workspaces(database), await list_workspaces(database, archived=True)
        return [[workspace.name for workspace in page.items] for page in shown]

    assert tell(story) == [["default"], ["acme", "default"]]


def test_the_default_workspace_cannot_be_archived_or_renamed(tell):
    async def story(database, vault):
        with pytest.raises(BadInput, match="cannot be archived"):
            await archive_workspace(database, "default")
        with pytest.raises(BadInput, match="keeps its name"):
            await change_workspace(database, "default", {"name": "other"})

    tell(story)


def test_a_workspace_whose_key_is_destroyed_gives_it_to_nobody(tell):
    async def story(database, vault):
        acme = await create_workspace(database, vault, "acme")
        with pytest.raises(BadInput, match="archive it first"):
            await destroy_workspace_key(database, acme.id)
        await archive_workspace(database, acme.id)
        await destroy_workspace_key(database, acme.id)
        async with database.reading() as connection:
            with pytest.raises(NotFound):
                await workspace_key(connection, vault, acme.id)

    tell(story)


def test_new_workspaces_begin_with_the_limits_that_the_organisation_set(tell):
    async def story(database, vault):
        async with database.writing() as connection:
            organization_id, _ = await organization(connection)
            await set_limit(connection, "workspace", organization_id, 1000, 7)
        usual = await create_workspace(database, vault, "usual")
        special = await create_workspace(database, vault, "special", limit_bytes=5)
        async with database.reading() as connection:
            return await usage(connection, "workspace", usual.id), await usage(connection, "workspace", special.id)

    usual, special = tell(story)
    assert (usual.limit_bytes, usual.limit_files) == (1000, 7)
    assert (special.limit_bytes, special.limit_files) == (5, 7)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": ""}, "1 to 100 characters"),
        ({"name": "a\nb"}, "no control characters"),
        ({"requests_per_minute": 0}, "a whole number from 1"),
        ({"requests_per_minute": True}, "a whole number from 1"),
        ({"downloads": "everybody"}, "'owner' or 'nobody'"),
        ({"colour": "red"}, "one of name, requests_per_minute, downloads"),
    ],
)
def test_a_setting_that_a_workspace_cannot_have_is_named(tell, changes, told):
    async def story(database, vault):
        with pytest.raises(BadInput, match=told):
            await change_workspace(database, "default", changes)

    tell(story)


def test_settings_change_and_can_be_taken_back(tell):
    async def story(database, vault):
        await change_workspace(database, "default", {"requests_per_minute": 5, "downloads": "nobody"})
        changed = await change_workspace(database, "default", {"requests_per_minute": None})
        async with database.reading() as connection:
            assert await find_workspace(connection, "default") == changed
        return changed

    changed = tell(story)
    assert (changed.requests_per_minute, changed.downloads) == (None, "nobody")
