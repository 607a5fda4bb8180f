"""The end of a workspace: nothing of it can be read afterwards, and others' files are as they were."""

import asyncio
import json
from dataclasses import replace

import pytest
import time_machine

from ropewalk.cli import main
from ropewalk.errors import BadInput, NotFound
from ropewalk.files import receipts, resumable
from ropewalk.files.closing import delete_workspace
from ropewalk.tenants import audit
from ropewalk.tenants.quotas import Usage, usage
from ropewalk.tenants.workspaces import create_workspace, find_workspace, workspace_key


async def filled(store, name):
    """A workspace with two files of one content, one of a user, an expired one, and an upload that has begun."""
    made = await create_workspace(store.database, store.vault, name)
    caller = await store.local_caller(made.id)
    with time_machine.travel("2026-01-01T00:00:00Z", tick=False):
        await store.put(caller, b"canary expired", "expired.txt", expires_in=3600)
    for number in range(2):
        await store.put(caller, b"canary twice", f"{number}.txt")
    await store.put(replace(caller, user_id="ann"), b"canary of ann", "ann.txt")
    await resumable.create(store, caller, 10, "begun.txt")
    return made, caller


def test_a_deleted_workspace_leaves_receipts_and_nothing_to_read(opened):
    async def body(store, default):
        kept = await store.put(default, b"others keep theirs", "kept.txt")
        made, caller = await filled(store, "acme")
        found = [receipt async for receipt in delete_workspace(store, "acme")]
        assert [receipt.content for receipt in found].count("shared") == 1
        assert len(found) == 4
        async with store.database.reading() as connection:
            every = await receipts.issued(connection, 1000)
            receipts.verify_chain(every, store.signing_key.public_key())
            with pytest.raises(NotFound):
                await workspace_key(connection, store.vault, made.id)
            assert await usage(connection, "workspace", made.id) == Usage()
            assert (await find_workspace(connection, made.id)).archived_at is not None
        assert (await store.list(caller, 10)).files == []
        assert len(await asyncio.to_thread(lambda: list(store.blobs.names()))) == 1
        assert (
            b"".join([chunk async for chunk in (await store.open_content(default, kept.id)).chunks()]) == b"others keep theirs"
        )
        assert [receipt async for receipt in delete_workspace(store, made.id)] == []  # a second time changes nothing
        told = await audit.entries(store.database, workspace_id=made.id, newest=True)
        assert [entry["action"] for entry in told[:2]] == ["workspace_deleted", "file_deleted"]
        assert (await audit.verify(store.database)).faults == ()
        again = await create_workspace(store.database, store.vault, "acme")
        assert again.id != made.id

    opened(body)


def test_an_upload_that_was_admitted_before_ends_first_and_is_deleted_too(opened):
    async def body(store, default):
        made = await create_workspace(store.database, store.vault, "acme")
        caller = await store.local_caller("acme")
        async with store.incoming(caller) as incoming:
            await incoming.write(b"late")
            deleting = asyncio.ensure_future(_all(delete_workspace(store, "acme")))
            await asyncio.sleep(0.5)
            assert not deleting.done()
            late = await incoming.finish("late.txt")
        found = await deleting
        assert [receipt.is_of(late.id) for receipt in found] == [True]
        async with store.database.reading() as connection:
            assert await usage(connection, "workspace", made.id) == Usage()

    opened(body)


async def _all(iterator):
    return [item async for item in iterator]


def test_the_default_workspace_is_not_deleted(opened):
    async def body(store, default):
        kept = await store.put(default, b"kept", "kept.txt")
        with pytest.raises(BadInput, match="cannot be archived"):
            await _all(delete_workspace(store, "default"))
        assert (await store.show(default, kept.id)).size == 4

    opened(body)


def test_the_command_asks_to_be_certain_and_saves_the_receipts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "data"))
    file = tmp_path / "canary.txt"
    file.write_text("canary in the bytes")
    assert main(["workspaces", "create", "acme"]) == 0
    assert main(["files", "put", "--workspace", "acme", str(file), "--json"]) == 0
    capsys.readouterr()
    assert main(["workspaces", "delete", "acme"]) == 2
    assert "has 1 files, and none of them can be got back: say --yes" in capsys.readouterr().err
    saved = tmp_path / "receipts.jsonl"
    assert main(["workspaces", "delete", "acme", "--yes", "--receipts", str(saved)]) == 0
    assert json.loads(saved.read_text())["content"] == "erased"
    assert main(["workspaces", "delete", "acme", "--yes"]) == 2
    assert "Workspace `acme` not found." in capsys.readouterr().err
    one = tmp_path / "receipt.json"
    one.write_text(saved.read_text())
    assert main(["files", "verify-receipt", str(one)]) == 0
    kept = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert b"canary" not in kept
