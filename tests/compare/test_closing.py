"""What becomes of comparisons when their workspace ends, and when the store is saved and brought back."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Table, func, insert, select

from ropewalk.compare import records, tables
from ropewalk.compare.candidates import add_cards, list_candidates
from ropewalk.compare.closing import forget
from ropewalk.compare.state import State
from ropewalk.compare.suites import add_suite, list_suites, prompts
from ropewalk.compare.verdict import Reason, Verdict
from ropewalk.database import metadata
from ropewalk.files.backup import backup, restore
from ropewalk.files.closing import delete_workspace
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.tenants.workspaces import create_workspace

NAMES = {table.name for table in vars(tables).values() if isinstance(table, Table)}
OURS = [table for table in metadata.sorted_tables if table.name in NAMES]


def value_of(column, ids):
    """Something that a column takes, such as an id of the row it refers to."""
    for key in column.foreign_keys:
        if key.column.table.name in ids:
            return ids[key.column.table.name]
    kind = column.type.python_type
    return {str: f"{column.table.name} {column.name}", int: 0, float: 0.5, bool: True, bytes: b"\0" * 8}[kind]


async def filled(store, caller):
    """A row in every table, each referring to the others."""
    file = await store.put(caller, b'{"prompt": "from a file", "reference": "b"}', "q.jsonl")
    suite = await add_suite(store, caller, file.id, hold=0)
    [asked] = await prompts(store, caller, suite.id)
    ids = {"workspaces": caller.workspace_id, "suites": suite.id, "prompts": asked.id}
    async with store.database.writing() as connection:
        for table in OURS:
            if table.name in ("suites", "prompts"):
                continue
            row = {column.name: value_of(column, ids) for column in table.c if not column.nullable or column.foreign_keys}
            if "id" in table.c:
                row["id"] = ids[table.name] = f"{table.name}_{caller.workspace_id}"
            if "token_hash" in table.c or "ticket" in table.c:
                row |= {name: caller.workspace_id.encode() for name in ("token_hash", "ticket") if name in table.c}
            await connection.execute(insert(table).values(row))
    return suite


async def counted(store):
    async with store.database.reading() as connection:
        return {table.name: (await connection.execute(select(func.count()).select_from(table))).scalar() for table in OURS}


def test_a_workspace_that_ends_takes_all_that_was_compared_in_it_and_nothing_else(opened):
    async def body(store, caller):
        made = await create_workspace(store.database, store.vault, "other")
        ending = replace(caller, workspace_id=made.id)
        await filled(store, caller)
        before = await counted(store)
        assert set(before.values()) == {1}
        await filled(store, ending)
        assert set((await counted(store)).values()) == {2}
        receipts = [receipt async for receipt in delete_workspace(store, made.id, [forget])]
        assert [receipt.derived for receipt in receipts] == [("suite",)]
        after = await counted(store)
        assert after.pop("fingerprints") == 2  # of machines, which belong to nobody
        assert set(after.values()) == {1}
        assert [receipt async for receipt in delete_workspace(store, made.id, [forget])] == []

    opened(body)


def test_a_backup_brings_everything_back(opened, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_ROOT_KEY", "A" * 43 + "=")

    async def body(store, caller):
        file = await store.put(caller, b'{"prompt": "kept", "reference": "b"}', "q.jsonl")
        gone = await store.put(caller, b'{"prompt": "gone", "reference": "b"}', "gone.jsonl")
        suite = await add_suite(store, caller, file.id, hold=0)
        await add_suite(store, caller, gone.id, hold=0)
        old, new = await add_cards(store, caller, PAGE)
        made = await records.create(store, caller, baseline_id=old.id, candidate_ids=[new.id])
        verdict = Verdict(new.id, old.id, State.OPINION_ONLY, (Reason("Nothing was run."),), "v")
        stored = await records.save_verdicts(store, caller, made.id, [verdict], b"")
        await store.delete(caller, gone.id)
        await backup(store, tmp_path / "backup")
        await restore(tmp_path / "backup", Settings(data=tmp_path / "again"))
        other = await Store.open(Settings(data=tmp_path / "again"))
        try:
            assert await list_suites(other, caller) == [suite]
            assert [prompt.text for prompt in await prompts(other, caller, suite.id)] == ["kept"]
            assert await list_candidates(other, caller) == await list_candidates(store, caller)
            assert await records.latest(other, caller, made.id) == stored
            assert (await other.delete(caller, file.id)).derived == ("suite",)
            assert await list_suites(other, caller) == []
        finally:
            await other.close()

    opened(body)


PAGE = """Compare/One vs Two
Side by side
One vs Two
O
Tools
One
Does it
Free
Entry
It is 12x faster.
T
Tools
Two
Does it too
Paid
Entry
It works.
Decision
One
Two
Panel verdict
Community
Pricing
Best for
Category
Tools
Tools
Reviewer scorecard
"""
