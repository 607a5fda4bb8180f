"""A backup made while files come and go holds every file whole, and fills an empty place elsewhere."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from sqlalchemy import func, select

from ropewalk.cli import main
from ropewalk.errors import BadInput, DamagedContent, NotFound
from ropewalk.files import backup as backups
from ropewalk.files import resumable
from ropewalk.files.backup import backup, restore
from ropewalk.files.integrity import verify
from ropewalk.files.lifecycle import expire
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.files.tables import blobs, files
from ropewalk.tenants import quotas
from ropewalk.tenants.audit import verify as verify_audit


@pytest.fixture(autouse=True)
def _root_key(monkeypatch):
    monkeypatch.setenv("ROPEWALK_ROOT_KEY", "A" * 43 + "=")


@asynccontextmanager
async def opened(settings):
    store = await Store.open(settings)
    try:
        yield store, replace(await store.local_caller(), key_id="key_a", user_id="ann")
    finally:
        await store.close()


@pytest.fixture(params=["folder", "postgres and bucket"])
def settings(request, tmp_path):
    if request.param == "folder":
        return Settings(data=tmp_path / "data")
    return Settings(tmp_path / "data", request.getfixturevalue("postgres_url"), request.getfixturevalue("bucket_url"))


async def contents(store, caller):
    """filename -> bytes of every file that is not expired."""
    listing = await store.list(caller, 1000)
    return {
        file.filename: await (await store.open_content(caller, file.id)).read() for file in listing.files if not file.expired
    }


async def counted(store, caller):
    """Counters of every scope of the caller, which must equal the sums over the rows; the used bytes and files."""
    async with store.database.reading() as connection:
        used = [await quotas.usage(connection, scope, id) for scope, id in quotas.scopes(caller)]
        live = select(func.coalesce(func.sum(files.c.size), 0), func.count()).where(files.c.expired_at.is_(None))
        size, count = (await connection.execute(live)).one()
    assert [(u.used_bytes, u.used_files, u.reserved_bytes, u.reserved_files) for u in used] == [(int(size), count, 0, 0)] * 4
    return int(size), count


def test_a_backup_made_while_uploads_and_deletions_go_on_is_whole_elsewhere(settings, tmp_path):
    async def test():
        written, deleted = {}, []
        async with opened(settings) as (store, caller):

            async def upload(number):
                data = os.urandom(number * 37_000)
                file = await store.put(caller, data, f"{number}.bin")
                written[file.filename] = data
                return file

            async def come_and_go(numbers):
                for number in numbers:
                    file = await upload(number)
                    if number % 3 == 0:
                        await store.delete(caller, file.id)
                        del written[file.filename]
                        deleted.append(file.filename)

            before = [await upload(number) for number in range(100, 112)]
            busy = asyncio.gather(come_and_go(range(1, 25)), come_and_go(range(30, 55)))
            await asyncio.sleep(0.02)
            report = await backup(store, tmp_path / "backup")
            await busy
            assert len(written) > report.files >= len(before)
        async with opened(Settings(data=tmp_path / "backup")) as (store, caller):
            there = await contents(store, caller)
            assert {f"{number}.bin" for number in range(100, 112)} <= set(there)
            assert all(data == written.get(name, data) for name, data in there.items())
            assert (await counted(store, caller))[1] == len(there) == report.files
            assert (await verify(store)).whole
            assert not (await verify_audit(store.database)).faults
        async with opened(settings) as (store, caller):  # and the store itself went on undisturbed
            assert await contents(store, caller) == written

    asyncio.run(test())


@pytest.mark.parametrize("target", ["folder", "postgres and bucket"])
def test_a_restored_store_has_the_same_files_keys_and_counters_and_goes_on(settings, tmp_path, target, request):
    async def test():
        async with opened(settings) as (store, caller):
            kept = await store.put(caller, b"kept" * 500_000, "kept.bin", tags=["a", "b"], expires_in=3600)
            await store.put(caller, b"kept" * 500_000, "same.bin")
            await store.put(caller, b"", "empty.bin")
            await store.keep_derived(kept, "text", "plain", b"derived")
            gone = await store.put(caller, b"gone", "gone.bin", expires_in=0)
            await expire(store)
            receipt = await store.delete(caller, (await store.put(caller, b"x", "x.bin")).id)
            expected, counters = await contents(store, caller), await counted(store, caller)
            await backup(store, tmp_path / "backup")
        report = await restore(tmp_path / "backup", elsewhere)
        assert (report.files, report.contents, report.missing) == (4, 3, 0)
        async with opened(elsewhere) as (store, caller):
            assert await contents(store, caller) == expected
            assert await counted(store, caller) == counters
            assert (await store.show(caller, kept.id)).tags == ("a", "b")
            assert (await store.show(caller, gone.id)).expired
            assert await store.derived(kept, "text", "plain") == b"derived"
            assert (await verify(store)).whole
            again = await store.delete(caller, kept.id)
            assert again.sequence == receipt.sequence + 1  # the chain of receipts goes on

    elsewhere = Settings(data=tmp_path / "elsewhere")
    if target != "folder":
        server, bucket = request.getfixturevalue("postgres_server"), request.getfixturevalue("bucket_server")
        request.getfixturevalue("bucket_url")
        elsewhere = Settings(tmp_path / "elsewhere", server.new_database(), bucket.new_url())
    asyncio.run(test())


def test_what_is_deleted_while_a_backup_is_made_is_not_in_it(tmp_path, monkeypatch):
    async def test():
        async with opened(Settings(data=tmp_path / "data")) as (store, caller):
            early, late, _ = [await store.put(caller, name.encode() * 99, name) for name in ("early", "late", "kept")]
            shared = await store.put(caller, b"kept" * 99, "shared")
            real = backups._copy_bytes

            async def copy(*arguments):
                await store.delete(caller, early.id)  # after the rows, before the bytes
                copied = await real(*arguments)
                await store.delete(caller, late.id)  # after the bytes
                await store.delete(caller, shared.id)  # its bytes stay, for another file
                return copied

            monkeypatch.setattr(backups, "_copy_bytes", copy)
            report = await backup(store, tmp_path / "backup")
        assert (report.files, report.contents, report.missing) == (1, 1, 0)
        assert len([path for path in (tmp_path / "backup" / "files").rglob("*") if path.is_file()]) == 1
        async with opened(Settings(data=tmp_path / "backup")) as (store, caller):
            assert await contents(store, caller) == {"kept": b"kept" * 99}
            assert await counted(store, caller) == (4 * 99, 1)
            async with store.database.reading() as connection:
                assert (await connection.execute(select(blobs.c.refs))).scalars().all() == [1]

    asyncio.run(test())


def test_what_expires_while_a_backup_is_made_has_expired_in_it(tmp_path, monkeypatch):
    async def test():
        async with opened(Settings(data=tmp_path / "data")) as (store, caller):
            file = await store.put(caller, b"short-lived", "x", expires_in=0)
            real = backups._copy_bytes

            async def copy(*arguments):
                await expire(store)
                return await real(*arguments)

            monkeypatch.setattr(backups, "_copy_bytes", copy)
            report = await backup(store, tmp_path / "backup")
        assert (report.files, report.contents) == (1, 0)
        async with opened(Settings(data=tmp_path / "backup")) as (store, caller):
            assert (await store.show(caller, file.id)).expired_at is not None
            assert await counted(store, caller) == (0, 0)

    asyncio.run(test())


def test_a_second_backup_copies_what_is_new_and_drops_what_was_deleted(tmp_path):
    async def test():
        async with opened(Settings(data=tmp_path / "data")) as (store, caller):
            first = await store.put(caller, b"first", "first")
            await store.put(caller, b"second", "second")
            assert (await backup(store, tmp_path / "backup")).copied == 2
            await store.delete(caller, first.id)
            await store.put(caller, b"third", "third")
            report = await backup(store, tmp_path / "backup")
            assert (report.files, report.contents, report.copied) == (2, 2, 1)
        async with opened(Settings(data=tmp_path / "backup")) as (store, caller):
            assert await contents(store, caller) == {"second": b"second", "third": b"third"}
            assert len(list(store.blobs.names())) == 2

    asyncio.run(test())


def test_a_backup_that_is_killed_leaves_the_older_one_and_is_made_again(tmp_path):
    async def fill(number):
        async with opened(Settings(data=tmp_path / "data")) as (store, caller):
            for n in range(5):
                await store.put(caller, f"{number} {n}".encode(), f"{number}-{n}")
            if not number:
                await backup(store, tmp_path / "backup")

    code = (
        "import asyncio\nfrom pathlib import Path\nfrom ropewalk.files.backup import backup\n"
        "from ropewalk.files.settings import Settings\nfrom ropewalk.files.store import Store\n"
        f"async def main():\n    store = await Store.open(Settings(data=Path({str(tmp_path / 'data')!r})))\n"
        f"    await backup(store, Path({str(tmp_path / 'backup')!r}))\nasyncio.run(main())"
    )
    asyncio.run(fill(0))
    asyncio.run(fill(1))
    environment = os.environ | {"ROPEWALK_FAILPOINT": "blob.renamed:3"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    asyncio.run(restore(tmp_path / "backup", Settings(data=tmp_path / "old")))

    async def names(settings):
        async with opened(settings) as (store, caller):
            return set(await contents(store, caller))

    assert asyncio.run(names(Settings(data=tmp_path / "old"))) == {f"0-{n}" for n in range(5)}
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    asyncio.run(restore(tmp_path / "backup", Settings(data=tmp_path / "new")))
    assert asyncio.run(names(Settings(data=tmp_path / "new"))) == {f"{r}-{n}" for r in (0, 1) for n in range(5)}


def test_uploads_under_way_are_not_in_a_backup_nor_what_they_reserved(tmp_path):
    async def pieces():
        yield b"half"

    async def test():
        async with opened(Settings(data=tmp_path / "data")) as (store, caller):
            await store.put(caller, b"whole", "whole")
            upload = await resumable.create(store, caller, 8, "half")
            await resumable.append(store, caller, upload.id, 0, pieces())
            async with store.incoming(caller, 1000) as incoming:
                await incoming.write(b"x" * 1000)
                report = await backup(store, tmp_path / "backup")
        assert (report.files, report.contents) == (1, 1)
        async with opened(Settings(data=tmp_path / "backup")) as (store, caller):
            assert await contents(store, caller) == {"whole": b"whole"}
            assert await counted(store, caller) == (5, 1)  # and nothing is reserved
            assert len(list(store.blobs.names())) == 1

    asyncio.run(test())


def one_file(tmp_path):
    async def make():
        async with opened(Settings(data=tmp_path / "data")) as (store, caller):
            await store.put(caller, b"data", "x")
            return await backup(store, tmp_path / "backup")

    return asyncio.run(make())


def test_a_place_that_holds_a_store_is_neither_restored_nor_backed_up_over(tmp_path):
    one_file(tmp_path)
    with pytest.raises(BadInput, match="a store is there already"):
        asyncio.run(restore(tmp_path / "backup", Settings(data=tmp_path / "data")))

    async def into(folder):
        async with opened(Settings(data=tmp_path / "data")) as (store, _):
            await backup(store, folder)

    with pytest.raises(BadInput, match="own folder"):
        asyncio.run(into(tmp_path / "data"))
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    with pytest.raises(BadInput, match="holds a store and no backup"):
        asyncio.run(into(tmp_path / "other"))


def test_a_folder_without_a_finished_backup_is_refused(tmp_path):
    with pytest.raises(NotFound, match="no finished backup"):
        asyncio.run(restore(tmp_path, Settings(data=tmp_path / "data")))
    (tmp_path / "backup.json").write_text("{}")
    with pytest.raises(NotFound, match="no finished backup"):
        asyncio.run(restore(tmp_path, Settings(data=tmp_path / "data")))


def test_a_backup_with_another_root_key_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    one_file(tmp_path)
    monkeypatch.setenv("ROPEWALK_ROOT_KEY", "B" * 43 + "=")
    with pytest.raises(BadInput, match="root key does not open"):
        asyncio.run(restore(tmp_path / "backup", Settings(data=tmp_path / "elsewhere")))


def lose_bytes(folder):
    for path in (folder / "files" / "blobs").rglob("*"):
        if path.is_file():
            path.unlink()


def test_a_backup_that_lacks_bytes_is_refused_and_one_of_a_damaged_store_says_so(tmp_path):
    assert one_file(tmp_path).missing == 0
    lose_bytes(tmp_path / "backup")
    with pytest.raises(DamagedContent, match="lacks the bytes of 1"):
        asyncio.run(restore(tmp_path / "backup", Settings(data=tmp_path / "elsewhere")))
    lose_bytes(tmp_path / "data")

    async def again():
        async with opened(Settings(data=tmp_path / "data")) as (store, _):
            return await backup(store, tmp_path / "backup")

    assert asyncio.run(again()).missing == 1


def test_the_mark_says_what_is_there(tmp_path):
    report = one_file(tmp_path)
    told = json.loads((tmp_path / "backup" / "backup.json").read_text())
    assert (told["files"], told["contents"], told["size"]) == (1, 1, 4 + 16)
    assert told["made_at"] == report.made_at


def test_the_commands_back_up_and_restore(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    (tmp_path / "facts.txt").write_text("facts")
    assert main(["files", "put", str(tmp_path / "facts.txt")]) == 0
    id = capsys.readouterr().out.strip()
    assert main(["files", "backup", str(tmp_path / "backup")]) == 0
    assert capsys.readouterr().out == "1 files, 1 contents, 21 bytes; 1 contents are new\n"
    assert main(["files", "restore", str(tmp_path / "backup")]) == 2
    assert "a store is there already" in capsys.readouterr().err
    assert main(["files", "restore", str(tmp_path / "backup"), "--data", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 1
    assert main(["files", "get", id, "--data", str(tmp_path / "new"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == "facts"
    assert main(["files", "verify", "--data", str(tmp_path / "backup")]) == 0
