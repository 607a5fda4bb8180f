"""What questions cost: added up by day and file, durable, and gone with the file."""

import asyncio

from sqlalchemy import select

from ropewalk.files import token_ledger
from ropewalk.files.lifecycle import sweep
from ropewalk.files.tables import file_token_days
from ropewalk.files.token_ledger import FileTokens, Spent, TokenLedger, of_files, sample_storage
from ropewalk.tenants.tables import storage_days, token_days


async def put(store, caller, content=b"text", name="a.txt"):
    async def chunks():
        yield content

    return (await store.put(caller, chunks(), name)).id


async def rows(store, table):
    async with store.database.reading() as connection:
        return [tuple(row) for row in await connection.execute(select(table).order_by(*table.primary_key))]


def test_questions_add_up_by_day_and_by_file(opened, monkeypatch):
    monkeypatch.setattr(token_ledger, "today", lambda: "2026-11-22")

    async def body(store, caller):
        one, two = await put(store, caller), await put(store, caller, b"more", "b.txt")
        first, second = TokenLedger(store.database), TokenLedger(store.database)  # of two processes
        first.add(caller, "m", Spent(5, 100, 0, 7), {one: FileTokens(1, 90, 0)})
        second.add(caller, "m", Spent(6, 0, 100, 3), {one: FileTokens(1, 0, 90), two: FileTokens(1, 4, 2)})
        second.add(caller, "other", Spent(1, 2, 3, 4), {two: FileTokens(0, 8, 0)})
        await first.close()
        await second.close()
        assert await rows(store, token_days) == [
            (caller.workspace_id, "2026-11-22", "m", "", 2, 11, 100, 100, 10),
            (caller.workspace_id, "2026-11-22", "other", "", 1, 1, 2, 3, 4),
        ]
        assert await of_files(store.database, [one, two]) == {
            one: {"m": FileTokens(2, 90, 90)},
            two: {"m": FileTokens(1, 4, 2), "other": FileTokens(0, 8, 0)},
        }

    opened(body)


def test_a_question_alone_is_written_down_at_once(opened):
    async def body(store, caller):
        ledger = TokenLedger(store.database)
        ledger.add(caller, "m", Spent(1), {})
        async with asyncio.timeout(5):
            while not await rows(store, token_days):
                await asyncio.sleep(0.01)
        await ledger.close()

    opened(body)


def test_what_a_file_cost_goes_with_it_and_its_receipt_says_so(opened):
    async def body(store, caller):
        asked, silent = await put(store, caller), await put(store, caller, b"more", "b.txt")
        ledger = TokenLedger(store.database)
        ledger.add(caller, "m", Spent(1, 2, 3, 4), {asked: FileTokens(1, 2, 3)})
        await ledger.flush()
        assert "token_counts" in (await store.delete(caller, asked)).derived
        assert "token_counts" not in (await store.delete(caller, silent)).derived
        assert await rows(store, file_token_days) == []
        assert len(await rows(store, token_days)) == 1  # which names no file
        ledger.add(caller, "m", Spent(1, 2, 3, 4), {asked: FileTokens(1, 2, 3)})  # a reply that ended after the deletion
        await ledger.close()
        assert await rows(store, file_token_days) == []

    opened(body)


def test_what_cannot_be_written_now_is_written_later(opened, monkeypatch):
    async def body(store, caller):
        ledger, add = TokenLedger(store.database), token_ledger._add

        async def broken(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr(token_ledger, "PAUSE", 0.01)
        monkeypatch.setattr(token_ledger, "_add", broken)
        ledger.add(caller, "m", Spent(1), {})
        await asyncio.sleep(0.1)
        assert await rows(store, token_days) == []
        monkeypatch.setattr(token_ledger, "_add", add)
        async with asyncio.timeout(5):
            while not await rows(store, token_days):
                await asyncio.sleep(0.01)
        await ledger.close()
        assert [row[4] for row in await rows(store, token_days)] == [1]

    opened(body)


def test_the_most_that_was_stored_on_a_day_stays_told(opened, monkeypatch):
    monkeypatch.setattr(token_ledger, "today", lambda: "2026-11-22")

    async def body(store, caller):
        id = await put(store, caller, b"x" * 70)
        await sweep(store)
        await store.delete(caller, id)
        await put(store, caller, b"y" * 30)
        assert await sample_storage(store.database) == 0
        monkeypatch.setattr(token_ledger, "today", lambda: "2026-11-23")
        assert await sample_storage(store.database) == 1
        found = await rows(store, storage_days)
        assert found == [(caller.workspace_id, "2026-11-22", 70), (caller.workspace_id, "2026-11-23", 30)]

    opened(body)
