"""Uploads in several requests, on every place where their bytes may be kept; over HTTP they are tested in tests/server."""

import asyncio
import os

import pytest
from sqlalchemy import func, select

from ropewalk.errors import NotFound, OutputError, ResumeFailed
from ropewalk.files import resumable
from ropewalk.files.lifecycle import sweep
from ropewalk.files.store import Store
from ropewalk.files.tables import blobs, erasures, files, parts, resumables
from ropewalk.tenants import quotas
from ropewalk.vault import CHUNK


async def pieces(*found):
    for piece in found:
        yield piece


async def counted(store, *tables):
    async with store.database.reading() as connection:
        return [(await connection.execute(select(func.count()).select_from(table))).scalar_one() for table in tables]


async def reserved(store, caller):
    async with store.database.reading() as connection:
        found = await quotas.usage(connection, "workspace", caller.workspace_id)
        return found.used_bytes, found.reserved_bytes, found.used_files, found.reserved_files


@pytest.mark.parametrize("cuts", [(), (1,), (CHUNK,), (CHUNK, CHUNK + 1), (7, 2 * CHUNK + 7)])
def test_parts_of_any_size_make_the_file(opened, cuts):
    async def body(store, caller):
        data = os.urandom(3 * CHUNK)
        upload = await resumable.create(store, caller, len(data), "a.bin")
        for start, end in zip((0, *cuts), (*cuts, len(data))):
            upload = await resumable.append(store, caller, upload.id, start, pieces(data[start:end]))
        upload = await resumable.finish(store, upload)
        content = await store.open_content(caller, upload.file_id)
        assert await content.read() == data
        assert await counted(store, resumables, parts, erasures, blobs, files) == [1, 0, 0, 1, 1]
        assert await reserved(store, caller) == (len(data), 0, 1, 0)
        assert sorted(store.blobs.names()) == [content.name]

    opened(body)


def test_an_upload_that_is_ended_leaves_nothing(opened):
    async def body(store, caller):
        upload = await resumable.create(store, caller, 100, "a.bin")
        upload = await resumable.append(store, caller, upload.id, 0, pieces(b"x" * 60))
        assert (await sweep(store)).orphans == 0
        await resumable.terminate(store, caller, upload.id)
        with pytest.raises(NotFound):
            await resumable.show(store, caller, upload.id)
        assert await counted(store, resumables, parts, erasures) == [0, 0, 0]
        assert await reserved(store, caller) == (0, 0, 0, 0)
        assert [*store.blobs.names(), *store.blobs.staged()] == []

    opened(body)


def test_an_upload_that_is_ended_while_bytes_come_leaves_nothing_either(opened):
    async def body(store, caller):
        upload = await resumable.create(store, caller, 100, "a.bin")

        async def interrupted():
            yield b"x" * 60
            await resumable.terminate(store, caller, upload.id)
            yield b"y" * 20

        with pytest.raises(ResumeFailed):
            await resumable.append(store, caller, upload.id, 0, interrupted())
        assert await counted(store, resumables, parts, erasures) == [0, 0, 0]
        assert await reserved(store, caller) == (0, 0, 0, 0)
        assert [*store.blobs.names(), *store.blobs.staged()] == []

    opened(body)


def test_a_part_that_could_not_be_written_does_not_count(opened, monkeypatch):
    async def body(store, caller):
        upload = await resumable.create(store, caller, 3 * CHUNK, "a.bin")
        stage = store.blobs.stage

        def full(name):
            staged = stage(name)
            write, written = staged.write, []

            def once(data):
                written.append(data)
                if len(written) == 2:
                    raise OutputError("the disk is full")
                write(data)

            monkeypatch.setattr(staged, "write", once)
            return staged

        monkeypatch.setattr(store.blobs, "stage", full)
        with pytest.raises(OutputError):
            await resumable.append(store, caller, upload.id, 0, pieces(bytes(CHUNK), bytes(CHUNK), bytes(CHUNK)))
        monkeypatch.setattr(store.blobs, "stage", stage)
        assert (await resumable.show(store, caller, upload.id)).received == 0
        assert await counted(store, parts, erasures) == [0, 0]
        assert [*store.blobs.names(), *store.blobs.staged()] == []

    opened(body)


def test_processes_that_finish_the_same_upload_make_one_file(opened, settings, monkeypatch):
    class NobodyWaits(dict):
        def setdefault(self, id, lock):
            return lock

    monkeypatch.setattr(resumable, "_finishing", NobodyWaits())

    async def body(store, caller):
        upload = await resumable.create(store, caller, 2 * CHUNK, "a.bin")
        upload = await resumable.append(store, caller, upload.id, 0, pieces(os.urandom(2 * CHUNK)))
        other = await Store.open(settings)
        ends = await asyncio.gather(*[resumable.finish(one, upload) for one in (store, other, store, other)])
        await other.close()
        assert len({end.file_id for end in ends}) == 1
        assert await counted(store, files, blobs, parts) == [1, 1, 0]
        assert await reserved(store, caller) == (2 * CHUNK, 0, 1, 0)

    opened(body)
