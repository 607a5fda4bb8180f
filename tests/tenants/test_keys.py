"""Keys: shown once, kept as a digest, gone at once when revoked."""

import asyncio
import base64
import sqlite3
from datetime import timedelta

import pytest
import time_machine

from ropewalk.database import Database, now
from ropewalk.errors import BadInput, NotFound, PermissionDenied
from ropewalk.tenants.caller import RIGHTS
from ropewalk.tenants.keys import admit, authenticate, create_key, list_keys, rename_key, revoke_key
from ropewalk.tenants.secrets import NAMES, open_secret
from ropewalk.tenants.workspaces import archive_workspace, create_workspace, ensure_default, find_workspace, workspace_key
from ropewalk.vault import Vault


async def opened(database, vault, secret):
    """The key that a secret opens, by the database alone."""
    async with database.reading() as connection:
        return await authenticate(connection, await open_secret(connection, vault, "pepper"), secret)


async def admitted(database, key, workspace_id=None, user_id=None):
    async with database.reading() as connection:
        return (await admit(connection, key, workspace_id, user_id))[0]


def test_a_secret_opens_its_key_and_no_other_does(tell):
    async def story(database, vault):
        key, secret = await create_key(database, vault, "default", "laptop", user_id="ann")
        for wrong in ("", secret[:-1], secret + "x", secret.upper(), key.id, "rw-key-é"):
            assert await opened(database, vault, wrong) is None
        return key, secret, await opened(database, vault, secret)

    key, secret, found = tell(story)
    assert found == key
    assert secret.startswith("rw-user-")
    assert len(base64.urlsafe_b64decode(secret.removeprefix("rw-user-") + "=")) == 32
    assert key.hint == secret[-4:]


def test_kinds_of_keys_can_be_told_apart_by_their_beginning(tell):
    async def story(database, vault):
        _, admin = await create_key(database, vault, None, "first", rights=RIGHTS)
        _, usual = await create_key(database, vault, "default", "laptop")
        return admin, usual

    admin, usual = tell(story)
    assert admin.startswith("rw-admin-")
    assert usual.startswith("rw-key-")


def test_a_revocation_holds_at_once_in_another_process(url):
    vault = Vault(bytes(32))

    async def story():
        one, other = await Database.open(url), await Database.open(url)
        await ensure_default(one, vault)
        key, secret = await create_key(one, vault, "default", "laptop")
        assert await opened(other, vault, secret) == key
        revoked = await revoke_key(one, key.id)
        assert await opened(other, vault, secret) is None
        assert await revoke_key(other, key.id) == revoked  # a second time changes nothing
        await one.close()
        await other.close()
        return revoked

    assert asyncio.run(story()).status == "archived"


def test_a_key_ends_at_its_instant(tell):
    async def story(database, vault):
        with time_machine.travel("2026-11-22T12:00:00Z", tick=False) as clock:
            hour = now() + 3_600_000_000
            key, secret = await create_key(database, vault, "default", "visitor", expires_at=hour)
            clock.shift(timedelta(seconds=3599))
            assert await opened(database, vault, secret) == key
            clock.shift(timedelta(seconds=1))
            assert await opened(database, vault, secret) is None
            found = await list_keys(database, status="expired")
            assert [one.id for one in found.items] == [key.id]
            assert found.items[0].status == "expired"
            with pytest.raises(BadInput, match="has expired would open nothing"):
                await create_key(database, vault, "default", "late", expires_at=now())

    tell(story)


def test_the_database_holds_no_secret_in_the_clear(tmp_path):
    vault = Vault(bytes(32))
    url = f"sqlite:///{tmp_path / 'ropewalk.db'}"

    async def story():
        database = await Database.open(url)
        await ensure_default(database, vault)
        acme = await create_workspace(database, vault, "acme")
        made = [await create_key(database, vault, acme.id, f"k{i}") for i in range(3)]
        await revoke_key(database, made[0][0].id)
        async with database.reading() as connection:
            inner = [await open_secret(connection, vault, name) for name in NAMES]
            inner.append(await workspace_key(connection, vault, acme.id))
        await database.close()
        return [secret for _, secret in made], inner

    shown, inner = asyncio.run(story())
    bytes_kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    with sqlite3.connect(tmp_path / "ropewalk.db") as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()
    assert len(bytes_kept) > 50_000
    for secret in shown:
        token = secret.split("-", 2)[2]
        assert token.encode() not in bytes_kept
        assert base64.urlsafe_b64decode(token + "=") not in bytes_kept
    for key in inner:
        assert key not in bytes_kept
        assert key.hex() not in dump.lower()
        assert base64.b64encode(key).decode() not in dump


def test_a_secret_cannot_be_given_twice(tell):
    async def story(database, vault):
        await create_key(database, vault, "default", "one", secret="my-own-secret")
        with pytest.raises(BadInput, match="that of a key already"):
            await create_key(database, vault, "default", "two", secret="my-own-secret")
        return await list_keys(database)

    assert [key.name for key in tell(story).items] == ["one"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "k", "rights": ["fly"]}, "'fly' is no right"),
        ({"name": "k", "rights": []}, "without rights may do nothing"),
        ({"name": "k", "rights": ["admin"]}, "make it with --every-workspace"),
        ({"name": "k", "user_id": "a/b"}, "'a/b' is no user id"),
        ({"name": "k", "user_id": "x" * 129}, "is no user id"),
        ({"name": "k", "user_id": "ann", "rights": ["users"]}, "either bound to the user 'ann'"),
        ({"name": ""}, "is no name for a key"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(tell, arguments, told):
    async def story(database, vault):
        with pytest.raises(BadInput, match=told):
            await create_key(database, vault, "default", **arguments)

    tell(story)


def test_a_key_of_a_workspace_that_there_is_not_is_refused(tell):
    async def story(database, vault):
        with pytest.raises(NotFound, match="wrkspc_none"):
            await create_key(database, vault, "wrkspc_none", "k")

    tell(story)


def test_a_key_for_one_workspace_answers_every_other_id_alike(tell):
    async def story(database, vault):
        acme, other = [await create_workspace(database, vault, name) for name in ("acme", "other")]
        key, _ = await create_key(database, vault, acme.id, "laptop")
        assert (await admitted(database, key)).workspace_id == acme.id
        assert (await admitted(database, key, acme.id)).workspace_id == acme.id
        told = []
        for id in (other.id, "wrkspc_none"):
            with pytest.raises(PermissionDenied) as refused:
                await admitted(database, key, id)
            told.append(str(refused.value).replace(id, "ID"))
        return told

    foreign, missing = tell(story)
    assert foreign == missing


def test_a_key_for_every_workspace_takes_the_one_that_is_named_by_id(tell):
    async def story(database, vault):
        acme = await create_workspace(database, vault, "acme")
        key, _ = await create_key(database, vault, None, "robot", rights=["read"])
        async with database.reading() as connection:
            default = await find_workspace(connection, "default")
        assert (await admitted(database, key)).workspace_id == default.id
        assert (await admitted(database, key, acme.id)).workspace_id == acme.id
        for unknown in ("acme", "wrkspc_none"):
            with pytest.raises(NotFound):
                await admitted(database, key, unknown)
        await archive_workspace(database, acme.id)
        with pytest.raises(NotFound):
            await admitted(database, key, acme.id)

    tell(story)


def test_who_may_act_for_which_user(tell):
    async def story(database, vault):
        ann, _ = await create_key(database, vault, "default", "ann's", user_id="ann")
        plain, _ = await create_key(database, vault, "default", "plain")
        server, _ = await create_key(database, vault, "default", "server", rights=["read", "users"])
        assert (await admitted(database, ann)).user_id == "ann"
        assert (await admitted(database, ann, user_id="ann")).user_id == "ann"
        assert (await admitted(database, plain)).user_id is None
        assert (await admitted(database, server)).user_id is None
        assert (await admitted(database, server, user_id="ben")).user_id == "ben"
        with pytest.raises(PermissionDenied, match="acts for one user"):
            await admitted(database, ann, user_id="ben")
        with pytest.raises(PermissionDenied, match="needs the right 'users'"):
            await admitted(database, plain, user_id="ben")
        with pytest.raises(BadInput, match="no user id"):
            await admitted(database, server, user_id="a/b")

    tell(story)


def test_keys_are_listed_by_workspace_and_status(tell):
    async def story(database, vault):
        acme = await create_workspace(database, vault, "acme")
        one, _ = await create_key(database, vault, acme.id, "one")
        two, _ = await create_key(database, vault, acme.id, "two")
        await create_key(database, vault, None, "robot")
        await revoke_key(database, one.id)
        await rename_key(database, two.id, "second")
        with pytest.raises(BadInput, match="'gone' is no status"):
            await list_keys(database, status="gone")
        with pytest.raises(NotFound, match="key_none"):
            await revoke_key(database, "key_none")
        every, active = await list_keys(database), await list_keys(database, workspace_id=acme.id, status="active")
        first = await list_keys(database, limit=2)
        rest = await list_keys(database, limit=2, after_id=first.items[-1].id)
        assert [first.more, rest.more] == [True, False]
        assert first.items + rest.items == every.items
        return [[key.name for key in page.items] for page in (every, active)]

    assert tell(story) == [["robot", "second", "one"], ["second"]]
