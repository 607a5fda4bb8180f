"""Folders kept sealed in the blob store: there and back, counted, tied to files, and gone with what they belong to."""

import asyncio
import time

import pytest
from sqlalchemy import select, update

from ropewalk.errors import DamagedContent, NotFound, OutputError, QuotaExceeded
from ropewalk.files import archives as module
from ropewalk.files.backup import backup, restore
from ropewalk.files.closing import delete_workspace
from ropewalk.files.integrity import verify
from ropewalk.files.lifecycle import sweep
from ropewalk.files.packing import Ticket, pack, unpack
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.files.tables import archives, derived
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import create_workspace
from ropewalk.vault import CHUNK

WORDS = b"the lighthouse of Pellworm"


@pytest.fixture
def run(tmp_path):
    """A run's folder: a large file, an empty one, one in a folder."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-2").mkdir(parents=True)
    (folder / "checkpoints" / "step-2" / "weights").write_bytes(WORDS * (CHUNK // 10))
    (folder / "checkpoints" / "step-2" / "empty").write_bytes(b"")
    (folder / "events.jsonl").write_bytes(WORDS)
    (folder / "aside").write_bytes(b"not asked for")
    return folder


PATHS = ("checkpoints/step-2", "events.jsonl")


async def used(store, caller):
    async with store.database.reading() as connection:
        return (await quotas.usage(connection, "workspace", caller.workspace_id)).used_bytes


def test_a_folder_comes_back_by_a_ticket_alone_and_is_sealed_where_it_lies(opened, run, tmp_path):
    async def body(store, me):
        ticket = await store.archives.begin(me, "job", "adapter")
        assert await store.archives.find("job") == {}
        size = pack(ticket, run, PATHS)
        assert await store.archives.finish(ticket, size)
        assert list(await store.archives.find("job")) == ["adapter"]
        assert await used(store, me) == size
        assert WORDS not in store.blobs.read(ticket.id, 0, 1 << 20)
        back = tmp_path / "back"
        (back / "checkpoints").mkdir(parents=True)
        (back / "checkpoints" / "step-1").write_text("stays")
        (back / "events.jsonl").write_text("older")
        unpack(await store.archives.ticket("job", "adapter"), back)
        assert {str(path.relative_to(back)): path.read_bytes() for path in back.rglob("*") if path.is_file()} == {
            "checkpoints/step-1": b"stays",
            "checkpoints/step-2/weights": WORDS * (CHUNK // 10),
            "checkpoints/step-2/empty": b"",
            "events.jsonl": WORDS,
        }
        report = await verify(store)
        assert (report.whole, report.archives) == (True, 1)
        with pytest.raises(DamagedContent):
            unpack(Ticket(ticket.blobs, ticket.id, b"\0" * 32, size), tmp_path / "none")
        store.blobs.erase(ticket.id)
        assert [fault.partition(": ")[0] for fault in (await verify(store)).faults] == ["archive adapter of job"]

    opened(body)


def test_a_newer_one_takes_the_place_of_the_older_and_what_is_dropped_gives_its_room_back(opened, run):
    async def body(store, me):
        for paths in (PATHS, PATHS[1:]):
            assert await store.archives.keep(me, "job", "resume", run, paths)
        (kept,) = (await store.archives.find("job")).values()
        assert list(store.blobs.names()) == [kept.id]
        assert await used(store, me) == kept.size == 10240  # a tar's least
        assert await store.archives.keep(me, "job", "adapter", run, PATHS[1:])
        assert await store.archives.drop("job", ["resume"]) == 1
        assert list(await store.archives.find("job")) == ["adapter"]
        assert await store.archives.drop("job") == 1
        assert (list(store.blobs.names()), await used(store, me)) == ([], 0)
        assert await store.archives.ticket("job", "adapter") is None

    opened(body)


def test_what_holds_words_of_a_file_dies_with_it(opened, run):
    async def body(store, me):
        first, second = [(await store.put(me, data, f"{data}.txt")).id for data in (b"1", b"22")]
        assert await store.archives.keep(me, "job", "resume", run, PATHS, (first, second), "job_state")
        late = await store.archives.begin(me, "job", "later", (first,), "job_state")
        receipt = await store.delete(me, first)
        assert receipt.derived == ("job_state",)
        assert await store.archives.find("job") == {}
        assert await used(store, me) == 2
        assert not await store.archives.finish(late, pack(late, run, PATHS))  # it was written after the file had gone
        assert len(list(store.blobs.names())) == 1
        await store.delete(me, second)
        assert list(store.blobs.names()) == []
        async with store.database.reading() as connection:
            assert (await connection.execute(select(archives))).all() == (await connection.execute(select(derived))).all() == []
        with pytest.raises(NotFound):
            await store.archives.begin(me, "job", "resume", (first,))

    opened(body)


def test_what_may_not_be_kept_leaves_nothing(opened, run, monkeypatch):
    async def body(store, me):
        async def never(connection):
            return False

        assert await store.archives.keep(me, "job", "a", run, PATHS[1:])
        assert not await store.archives.keep(me, "job", "a", run, PATHS, guard=never)
        with pytest.raises(FileNotFoundError):
            await store.archives.keep(me, "job", "a", run, ("checkpoints/step-2", "gone"))
        (run / "link").symlink_to("/etc")
        with pytest.raises(OutputError, match="neither a file nor a folder"):
            await store.archives.keep(me, "job", "a", run, ("link",))
        async with store.database.writing() as connection:
            await quotas.set_limit(connection, "workspace", me.workspace_id, 20_000, None)
        with pytest.raises(QuotaExceeded):
            await store.archives.keep(me, "job", "a", run, PATHS)
        # One whose writer has died goes when its lease is over; the sweep leaves one alone that is on its way.
        dead, alive = [await store.archives.begin(me, "job", name) for name in ("dead", "alive")]
        pack(dead, run, PATHS)
        async with store.database.writing() as connection:
            await connection.execute(update(archives).where(archives.c.id == dead.id).values(lease_until=1))
        pack(alive, run, PATHS[1:])
        assert (await sweep(store)).abandoned == 1
        assert not await store.archives.finish(dead, 1)
        assert await store.archives.drop("job", ["a"]) == 1  # makes room
        assert await store.archives.finish(alive, 10240)
        assert list(store.blobs.names()) == [alive.id]
        assert await used(store, me) == 10240

    opened(body)


def test_a_backup_holds_them_and_a_workspace_takes_them_along(opened, run, settings, tmp_path, monkeypatch):
    async def body(store, me):
        made = await create_workspace(store.database, store.vault, "other")
        other = Caller(made.organization_id, made.id, None)
        for caller in (me, other):
            assert await store.archives.keep(caller, f"job of {caller.workspace_id}", "adapter", run, PATHS)
        await store.archives.begin(me, "job", "under way")
        await backup(store, tmp_path / "backup")
        assert [_ async for _ in delete_workspace(store, "other")] == []
        assert list(await store.archives.find(f"job of {other.workspace_id}")) == []
        await backup(store, tmp_path / "backup")
        fresh = Settings(data=tmp_path / "fresh")
        await restore(tmp_path / "backup", fresh)
        again = await Store.open(fresh)
        try:
            async with again.database.reading() as connection:
                assert len((await connection.execute(select(archives))).all()) == 1
            assert (await verify(again)).whole
            assert await used(again, me) == await used(store, me) > 0
            unpack(await again.archives.ticket(f"job of {me.workspace_id}", "adapter"), tmp_path / "back")
        finally:
            await again.close()
        assert (tmp_path / "back" / "events.jsonl").read_bytes() == WORDS

    opened(body)


def test_a_long_packing_keeps_its_lease(opened, run, monkeypatch):
    monkeypatch.setattr(module, "LEASE", 200_000)

    def slow(*arguments):
        time.sleep(0.5)
        return pack(*arguments)

    monkeypatch.setattr(module.packing, "pack", slow)

    async def body(store, me):
        keeping = asyncio.create_task(store.archives.keep(me, "job", "a", run, PATHS[1:]))
        await asyncio.sleep(0.35)
        assert await store.archives.abandon() == 0
        assert await keeping

    opened(body)
