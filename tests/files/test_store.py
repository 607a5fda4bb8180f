"""Bytes in, an id out, and the id gives back the bytes: on every place where they may be kept."""

import asyncio
import hashlib
from dataclasses import replace

import pytest
import time_machine
from sqlalchemy import func, select, update

from ropewalk.database import now
from ropewalk.errors import DamagedContent, FileExpired, NotDownloadable, NotFound, PermissionDenied, QuotaExceeded, TooLarge
from ropewalk.files.store import Store
from ropewalk.files.tables import blobs, uploads
from ropewalk.tenants import quotas
from ropewalk.tenants.tables import workspaces
from ropewalk.tenants.workspaces import create_workspace
from ropewalk.vault import CHUNK


async def count(store, table):
    async with store.database.reading() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


async def used(store, caller, scope="workspace"):
    async with store.database.reading() as connection:
        return await quotas.usage(connection, scope, dict(quotas.scopes(caller))[scope])


async def limited(store, caller, limit_bytes=None, limit_files=None):
    async with store.database.writing() as connection:
        await quotas.set_limit(connection, "workspace", caller.workspace_id, limit_bytes, limit_files)


async def read(store, caller, id, start=0, end=None):
    content = await store.open_content(caller, id)
    return b"".join([chunk async for chunk in content.chunks(start, end)])


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 17])
def test_bytes_come_back_whole_whatever_their_number(opened, size):
    async def body(store, caller):
        data = bytes(range(256)) * (size // 256) + bytes(size % 256)
        file = await store.put(caller, data, "data.bin")
        assert (file.size, file.sha256) == (size, hashlib.sha256(data).hexdigest())
        assert await read(store, caller, file.id) == data

    opened(body)


def test_any_range_of_bytes_can_be_read(opened):
    async def body(store, caller):
        data = hashlib.shake_256(b"range").digest(2 * CHUNK + 1000)
        file = await store.put(caller, data, "data.bin")
        for start, end in [
            (0, 1),
            (5, 5),
            (CHUNK - 1, CHUNK + 1),
            (CHUNK, 2 * CHUNK),
            (2 * CHUNK + 999, 2 * CHUNK + 1000),
            (7, None),
        ]:
            assert await read(store, caller, file.id, start, end) == data[start:end]

    opened(body)


def test_pieces_of_any_size_make_the_same_file(opened):
    async def body(store, caller):
        data = hashlib.shake_256(b"pieces").digest(CHUNK + 5000)

        async def pieces():
            for start in range(0, len(data), 4999):
                yield data[start : start + 4999]

        file = await store.put(caller, pieces(), "data.bin")
        assert await read(store, caller, file.id) == data
        assert await used(store, caller) == quotas.Usage(used_bytes=len(data), used_files=1)

    opened(body)


def test_equal_bytes_are_kept_once_in_a_workspace_and_apart_in_two(opened):
    async def body(store, caller):
        other = await create_workspace(store.database, store.vault, "other")
        stranger = await store.local_caller(other.id)
        first, second = await store.put(caller, b"same", "a"), await store.put(caller, b"same", "b")
        third = await store.put(stranger, b"same", "c")
        assert first.blob_id == second.blob_id != third.blob_id
        assert set(store.blobs.names()) == {first.blob_id, third.blob_id}
        assert (await used(store, caller)).used_bytes == 8  # each file counts
        await store.delete(caller, first.id)
        assert await read(store, caller, second.id) == b"same"
        await store.delete(caller, second.id)
        assert set(store.blobs.names()) == {third.blob_id}

    opened(body)


def test_the_bytes_on_disk_are_not_the_bytes(opened):
    async def body(store, caller):
        file = await store.put(caller, b"plain words " * 1000, "a")
        sealed = store.blobs.read(file.blob_id, 0, 1 << 20)
        assert b"plain words" not in sealed
        assert len(sealed) == file.size + 16

    opened(body)


def test_a_foreign_id_is_a_missing_id(opened):
    async def body(store, caller):
        other = await create_workspace(store.database, store.vault, "other")
        stranger = await store.local_caller(other.id)
        file = await store.put(caller, b"mine", "a")
        for call in (store.show, store.open_content, store.delete):
            with pytest.raises(NotFound) as foreign:
                await call(stranger, file.id)
            with pytest.raises(NotFound) as missing:
                await call(caller, file.id + "x")
            assert str(foreign.value) == str(missing.value).replace(file.id + "x", file.id)
        assert await store.find(stranger, [file.id]) == []
        assert (await store.list(stranger, 10)).files == []

    opened(body)


def test_a_user_of_a_workspace_sees_its_own_files_only(opened):
    async def body(store, caller):
        ann, bob = replace(caller, user_id="ann"), replace(caller, user_id="bob")
        file = await store.put(ann, b"hers", "a")
        assert (await store.show(caller, file.id)).user_id == "ann"
        with pytest.raises(NotFound):
            await store.show(bob, file.id)
        assert (await used(store, ann, "user")).used_bytes == 4
        await store.delete(caller, file.id)  # whoever deletes it, her quota is what is given back
        assert (await used(store, ann, "user")).used_bytes == 0

    opened(body)


def test_a_right_that_a_key_lacks_is_denied(opened):
    async def body(store, caller):
        file = await store.put(caller, b"x", "a")
        reader = replace(caller, rights=frozenset({"read"}))
        assert (await store.show(reader, file.id)).id == file.id
        with pytest.raises(PermissionDenied, match="'write'"):
            await store.delete(reader, file.id)
        with pytest.raises(PermissionDenied, match="'download'"):
            await store.open_content(reader, file.id, download=True)

    opened(body)


def test_a_workspace_may_keep_uploads_from_being_downloaded(opened):
    async def body(store, caller):
        file = await store.put(caller, b"x", "a")
        assert file.downloadable
        async with store.database.writing() as connection:
            await connection.execute(update(workspaces).values(downloads="nobody"))
        assert not (await store.show(caller, file.id)).downloadable
        with pytest.raises(NotDownloadable):
            await store.open_content(caller, file.id, download=True)
        assert await read(store, caller, file.id) == b"x"  # the server itself may

    opened(body)


def test_a_page_neither_repeats_nor_skips_while_files_come_and_go(opened):
    async def body(store, caller):
        ids = [(await store.put(caller, b"%d" % i, f"{i}")).id for i in range(7)]
        page = await store.list(caller, 3)
        assert [f.id for f in page.files] == ids[:3:-1]
        assert page.more
        await store.put(caller, b"new", "new")
        await store.delete(caller, ids[4])  # the last one seen
        rest = await store.list(caller, 10, after=page.files[-1].place)
        assert [f.id for f in rest.files] == ids[3::-1]
        assert not rest.more
        newer = await store.list(caller, 2, before=rest.files[0].place)
        assert [f.id for f in newer.files] == [ids[6], ids[5]]  # those next to it, newest first
        assert newer.more

    opened(body)


def test_tags_find_files(opened):
    async def body(store, caller):
        file = await store.put(caller, b"1", "a", tags=("lease", "2026"))
        await store.put(caller, b"2", "b", tags=("leases",))
        assert [f.id for f in (await store.list(caller, 9, tag="lease")).files] == [file.id]
        assert file.tags == ("lease", "2026")

    opened(body)


def test_an_expired_file_has_no_content_but_still_a_name(opened):
    async def body(store, caller):
        with time_machine.travel(0, tick=False) as clock:
            file = await store.put(caller, b"soon gone", "a", expires_in=3600)
            clock.shift(3599.9)
            assert await read(store, caller, file.id) == b"soon gone"
            clock.shift(0.2)
            with pytest.raises(FileExpired):
                await store.open_content(caller, file.id)
            assert (await store.show(caller, file.id)).expired
            receipt = await store.delete(caller, file.id)
            assert receipt.is_of(file.id)
        assert await used(store, caller) == quotas.Usage()

    opened(body)


def test_a_quota_is_kept_to_the_byte_and_the_file(opened):
    async def body(store, caller):
        await limited(store, caller, limit_bytes=10, limit_files=2)
        first = await store.put(caller, bytes(10), "a")
        with pytest.raises(QuotaExceeded, match="10 bytes"):
            await store.put(caller, b"1", "b")
        await store.delete(caller, first.id)
        await store.put(caller, bytes(4), "b")
        await store.put(caller, bytes(5), "c")
        with pytest.raises(QuotaExceeded, match="2 files"):
            await store.put(caller, b"", "d")
        assert await used(store, caller) == quotas.Usage(9, 0, 2, 0, 10, 2)

    opened(body)


def test_an_upload_of_unknown_length_stops_at_the_quota_and_leaves_nothing(opened):
    async def body(store, caller):
        await limited(store, caller, limit_bytes=40 << 20)

        async def endless():
            while True:
                yield bytes(1 << 20)

        with pytest.raises(QuotaExceeded):
            await store.put(caller, endless(), "a")
        assert (await used(store, caller)).reserved_bytes == 0
        assert (await count(store, uploads), list(store.blobs.names()), list(store.blobs.staged())) == (0, [], [])

    opened(body)


def test_a_file_larger_than_allowed_is_refused_before_and_while_it_comes(opened):
    async def body(store, caller):
        store.max_file_bytes = 100

        async def pieces():
            for _ in range(11):
                yield bytes(10)

        with pytest.raises(TooLarge, match="100 bytes"):
            await store.put(caller, bytes(101), "a")
        with pytest.raises(TooLarge, match="100 bytes"):
            await store.put(caller, pieces(), "a")
        assert (await store.put(caller, bytes(100), "a")).size == 100
        assert (await used(store, caller)).reserved_bytes == 0

    opened(body)


def test_an_upload_that_breaks_off_leaves_nothing(opened):
    async def body(store, caller):
        async def broken():
            yield bytes(3 * CHUNK)
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            await store.put(caller, broken(), "a")
        assert await used(store, caller) == quotas.Usage()
        assert (await count(store, uploads), list(store.blobs.names()), list(store.blobs.staged())) == (0, [], [])

    opened(body)


def test_an_upload_given_up_by_the_sweep_is_not_acknowledged(opened):
    async def body(store, caller):
        async with store.incoming(caller, 5) as incoming:
            await incoming.write(b"12345")
            async with store.database.writing() as connection:
                await connection.execute(uploads.delete())
                await quotas.release(connection, caller, 5, reserved=True)
            with pytest.raises(Exception, match="given up"):
                await incoming.finish("a")
        assert (await store.list(caller, 5)).files == []
        assert await used(store, caller) == quotas.Usage()

    opened(body)


def test_a_retried_upload_is_the_same_file_and_a_repeated_one_is_not(opened):
    async def body(store, caller):
        first = await store.put(caller, b"once", "a")
        assert (await store.put(caller, b"once", "a", retried=True)).id == first.id
        assert (await store.put(caller, b"once", "b", retried=True)).id != first.id
        assert (await store.put(caller, b"once", "a")).id != first.id
        with time_machine.travel(now() / 1e6 + 601):
            assert (await store.put(caller, b"once", "a", retried=True)).id != first.id
        assert len(list(store.blobs.names())) == 1
        assert (await used(store, caller)).used_files == 4

    opened(body)


def test_changed_bytes_are_never_served(opened):
    async def body(store, caller):
        data = hashlib.shake_256(b"damage").digest(2 * CHUNK)
        file = await store.put(caller, data, "a")
        sealed = bytearray(store.blobs.read(file.blob_id, 0, 4 * CHUNK))
        for damaged in (
            bytes(sealed[:-1]) + bytes([sealed[-1] ^ 1]),
            bytes(sealed[: CHUNK + 16]),  # cut off at a chunk's end
            bytes(sealed[CHUNK + 16 :] + sealed[: CHUNK + 16]),  # chunks exchanged
        ):
            store.blobs.erase(file.blob_id)
            staged = store.blobs.stage("again")
            staged.write(damaged)
            staged.publish(file.blob_id)
            with pytest.raises(DamagedContent):
                await read(store, caller, file.id)
        store.blobs.erase(file.blob_id)
        with pytest.raises(DamagedContent, match="missing"):
            await read(store, caller, file.id)

    opened(body)


def test_what_is_made_from_a_file_is_sealed_shared_and_erased_with_its_bytes(opened, tmp_path):
    async def body(store, caller):
        first, second = await store.put(caller, b"doc", "a"), await store.put(caller, b"doc", "b")
        text = b"extracted words " * 100_000
        await store.keep_derived(first, "text", "document", text)
        assert await store.derived(second, "text", "document") == text
        await store.keep_derived(first, "text", "document", b"newer")
        assert await store.derived(second, "text", "document") == b"newer"
        cache = tmp_path / "cache"
        cache.mkdir()
        (cache / "tokens.bin").write_bytes(b"1")
        await store.register_path(first.id, "tokens", cache)
        receipt = await store.delete(caller, first.id)
        assert not cache.exists()
        assert (receipt.content, receipt.shared_with, receipt.derived) == ("shared", 1, ("tokens",))
        receipt = await store.delete(caller, second.id)
        assert (receipt.content, receipt.derived) == ("erased", ("text",))
        assert (list(store.blobs.names()), await count(store, blobs)) == ([], 0)
        with pytest.raises(NotFound):
            await store.delete(caller, second.id)

    opened(body)


def test_of_many_who_delete_at_once_one_gets_the_receipt(opened):
    async def body(store, caller):
        file = await store.put(caller, b"x", "a")
        done = await asyncio.gather(*(store.delete(caller, file.id) for _ in range(8)), return_exceptions=True)
        assert sorted(type(result).__name__ for result in done) == ["NotFound"] * 7 + ["Receipt"]
        assert await used(store, caller) == quotas.Usage()

    opened(body)


def test_putting_and_deleting_the_same_bytes_at_once_never_loses_what_is_kept(opened):
    async def body(store, caller):
        async def work(_):
            file = await store.put(caller, b"shared by all", "x")
            kept = await read(store, caller, file.id)
            await store.delete(caller, file.id)
            return kept

        assert set(await asyncio.gather(*(work(i) for i in range(40)))) == {b"shared by all"}
        assert (list(store.blobs.names()), await used(store, caller)) == ([], quotas.Usage())

    opened(body)


def test_adapters_trained_on_a_file_are_named_on_its_receipt(opened):
    async def body(store, caller):
        file = await store.put(caller, b"rows", "rows.jsonl")
        store.adapters_of = lambda id: ["house"] if id == file.id else []
        assert (await store.delete(caller, file.id)).adapters == ("house",)

    opened(body)


def test_a_store_is_opened_with_its_own_root_key_only(tmp_path, monkeypatch):
    from ropewalk.errors import BadInput
    from ropewalk.files.settings import Settings

    async def body():
        await (await Store.open(Settings(data=tmp_path / "data"))).close()
        monkeypatch.setenv("ROPEWALK_ROOT_KEY", "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVowMTIzNDU=")
        with pytest.raises(BadInput, match="root key"):
            await Store.open(Settings(data=tmp_path / "data"))

    asyncio.run(body())
