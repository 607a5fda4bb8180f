"""Bookmarks: comparisons and candidates that somebody keeps in sight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, delete, func, select

from ropewalk.compare import records
from ropewalk.compare.candidates import get_candidate
from ropewalk.compare.candidates import visible as visible_candidate
from ropewalk.compare.tables import bookmarks, candidates, comparisons
from ropewalk.database import now
from ropewalk.errors import BadInput
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

MOST = 500  # of one person


@dataclass(frozen=True)
class Bookmark:
    """What is kept in sight."""

    target: str
    kind: Literal["comparison", "candidate"]
    title: str
    created_at: int


async def add_bookmark(store: Store, caller: Caller, target: str) -> None:
    """Keeps a comparison or a candidate in sight; once more changes nothing. NotFound for what the caller cannot see."""
    if target.startswith("cand_"):
        await get_candidate(store, caller, target)
    else:
        await records.get_comparison(store, caller, target)
    async with store.database.writing() as connection:
        count = await connection.scalar(select(func.count()).select_from(bookmarks).where(_mine(caller)))
        if int(count or 0) >= MOST:
            raise BadInput(f"there are {MOST} bookmarks already; remove one first")
        row = {"workspace_id": caller.workspace_id, "owner": owner(caller), "target": target, "created_at": now()}
        await connection.execute(store.database.upsert(bookmarks).values(row).on_conflict_do_nothing())


async def remove_bookmark(store: Store, caller: Caller, target: str) -> None:
    """Lets go of it; what was not kept stays so."""
    caller.needs("read")
    async with store.database.writing() as connection:
        await connection.execute(delete(bookmarks).where(_mine(caller), bookmarks.c.target == target))


async def list_bookmarks(store: Store, caller: Caller) -> list[Bookmark]:
    """What the caller keeps in sight, the last added first."""
    caller.needs("read")
    query = select(bookmarks.c.target, bookmarks.c.created_at, comparisons.c.title, candidates.c.name)
    query = query.join(comparisons, (comparisons.c.id == bookmarks.c.target) & records.visible(caller), isouter=True)
    query = query.join(candidates, (candidates.c.id == bookmarks.c.target) & visible_candidate(caller), isouter=True)
    there = comparisons.c.id.is_not(None) | candidates.c.id.is_not(None)
    order = bookmarks.c.created_at.desc(), bookmarks.c.target
    async with store.database.reading() as connection:
        rows = (await connection.execute(query.where(_mine(caller), there).order_by(*order))).all()
    return [
        Bookmark(row.target, "candidate", row.name, row.created_at)
        if row.title is None
        else Bookmark(row.target, "comparison", row.title, row.created_at)
        for row in rows
    ]


async def is_bookmarked(store: Store, caller: Caller, target: str) -> bool:
    """Whether the caller keeps it in sight."""
    caller.needs("read")
    query = select(bookmarks.c.target).where(_mine(caller), bookmarks.c.target == target)
    async with store.database.reading() as connection:
        return (await connection.execute(query)).first() is not None


def owner(caller: Caller) -> str:
    """Whose bookmarks a caller sees: its user's, else its key's, else those of whoever sits at the machine."""
    return f"user {caller.user_id}" if caller.user_id is not None else f"key {caller.key_id or ''}"


def _mine(caller: Caller) -> ColumnElement[bool]:
    return (bookmarks.c.workspace_id == caller.workspace_id) & (bookmarks.c.owner == owner(caller))
