"""Files that were written here from other files: they go with them, whatever way those go, on every place where they may be kept."""

from __future__ import annotations

import time

import pytest
import time_machine
from sqlalchemy import func, select

from ropewalk.errors import NotFound
from ropewalk.files.incoming import Made
from ropewalk.files.lifecycle import expire, sweep
from ropewalk.files.receipts import Receipt
from ropewalk.files.tables import BATCHES, FILES, derived, erasures, files
from ropewalk.tenants import quotas


def made(*sources: str) -> Made:
    return Made("questions", "rows of a job", sources, {"generator": "questions", "model": "house"})


async def count(store, table) -> int:
    async with store.database.reading() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


def test_a_file_names_what_it_was_made_from_and_goes_with_either(opened):
    async def body(store, caller):
        first, second = [(await store.put(caller, text, "a.txt")).id for text in (b"one", b"two")]
        file = await store.put(caller, b"rows", "rows.jsonl", purpose="fine-tune", made=made(first, second))
        assert (file.purpose, file.lineage) == (
            "fine-tune",
            {"generator": "questions", "model": "house", "files": [first, second]},
        )
        receipt = await store.delete(caller, first)
        assert isinstance(receipt, Receipt)
        assert receipt.derived == ("questions",)
        with pytest.raises(NotFound):
            await store.show(caller, file.id)
        assert (await store.show(caller, second)).id == second
        assert (await count(store, derived), await count(store, erasures)) == (0, 0)
        async with store.database.reading() as connection:
            assert (await quotas.usage(connection, "workspace", caller.workspace_id)).used_bytes == len(b"two")

    opened(body)


def test_a_file_goes_when_what_it_was_made_from_expires(opened):
    async def body(store, caller):
        source = await store.put(caller, b"one", "a.txt", expires_in=3600)
        file = await store.put(caller, b"rows", "rows.jsonl", made=made(source.id))
        with time_machine.travel(time.time() + 4000):
            assert await expire(store) == 1
            with pytest.raises(NotFound):
                await store.show(caller, file.id)

    opened(body)


def test_what_a_crash_left_of_a_deletion_is_deleted_by_the_sweep(opened, monkeypatch):
    async def body(store, caller):
        source = await store.put(caller, b"one", "a.txt")
        file = await store.put(caller, b"rows", "rows.jsonl", made=made(source.id))

        async def died(doomed):
            return 0

        with monkeypatch.context() as patch:
            patch.setattr(store, "erase", died)
            await store.delete(caller, source.id)
        assert (await store.show(caller, file.id)).id == file.id
        await sweep(store)
        with pytest.raises(NotFound):
            await store.show(caller, file.id)
        assert (await count(store, files), await count(store, erasures)) == (0, 0)

    opened(body)


def test_nothing_is_made_from_a_file_that_is_gone(opened):
    async def body(store, caller):
        source = await store.put(caller, b"one", "a.txt")
        await store.delete(caller, source.id)
        with pytest.raises(NotFound):
            await store.put(caller, b"rows", "rows.jsonl", made=made(source.id))
        assert await count(store, files) == 0
        assert list(store.blobs.names()) == []

    opened(body)


def test_a_made_file_that_is_deleted_first_leaves_no_tie(opened):
    async def body(store, caller):
        source = await store.put(caller, b"one", "a.txt")
        file = await store.put(caller, b"rows", "rows.jsonl", made=made(source.id))
        await store.delete(caller, file.id)
        assert await count(store, derived) == 0
        assert (await store.delete(caller, source.id)).derived == ()
        assert await store.erase([(FILES, file.id), (BATCHES, "msgbatch_none")]) == 2  # what is gone already is gone

    opened(body)
