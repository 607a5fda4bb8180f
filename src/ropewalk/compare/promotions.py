"""Promotions: which alias was moved to what, when, by whom, on which verdict, and whether it was taken back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.tables import promotions
from ropewalk.database import now, timestamp
from ropewalk.files.store import Store
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller

PAGE = 1000
COMMAND_LINE = "the command line"


@dataclass(frozen=True)
class Replay:
    """Recorded prompts that were asked again just before an alias was moved."""

    asked: int = 0
    equal: int = 0  # gave the recorded answer, letter for letter
    passed: int = 0  # gave another, which passes the checks that the recorded one passed
    files: int = 0  # read ahead for it


@dataclass(frozen=True)
class Promotion:
    """One move of an alias. Times are microseconds."""

    id: str
    workspace_id: str
    alias: str
    from_name: str | None  # None: the alias was new
    to_name: str
    to_digest: str
    comparison_id: str | None
    candidate_id: str | None
    verdict_id: str | None
    rule_version: str
    by: str
    override_reason: str | None  # None: the rule permitted it
    replay: Replay
    created_at: int
    rolled_back_at: int | None = None
    rolled_back_by: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        back = timestamp(self.rolled_back_at) if self.rolled_back_at is not None else None
        found = {**asdict(self), "created_at": timestamp(self.created_at), "rolled_back_at": back}
        return {name: value for name, value in found.items() if name != "workspace_id"}


async def write(connection: AsyncConnection, promotion: Promotion) -> None:
    """In the transaction that moves the alias."""
    row = {**vars(promotion), "replay": json.dumps(asdict(promotion.replay))}
    await connection.execute(insert(promotions).values(row))


async def take_back(connection: AsyncConnection, id: str, by: str) -> None:
    """Says that a promotion was rolled back."""
    mine = update(promotions).where(promotions.c.id == id)
    await connection.execute(mine.values(rolled_back_at=now(), rolled_back_by=by))


async def list_promotions(store: Store, caller: Caller, alias: str | None = None, limit: int = 100) -> list[Promotion]:
    """Moves of all aliases, or of one, newest first."""
    caller.needs("read")
    query = select(promotions).where(promotions.c.workspace_id == caller.workspace_id)
    if alias is not None:
        query = query.where(promotions.c.alias == alias)
    return await _found(store, query, limit)


async def of_candidate(store: Store, caller: Caller, candidate_id: str) -> list[Promotion]:
    """Moves to a candidate, newest first."""
    caller.needs("read")
    mine = (promotions.c.workspace_id == caller.workspace_id) & (promotions.c.candidate_id == candidate_id)
    return await _found(store, select(promotions).where(mine), PAGE)


async def standing(store: Store, caller: Caller, registry: Registry) -> dict[str, Promotion]:
    """By alias, the promotion by which it serves what it serves now; an alias that was moved in another way is left out."""
    caller.needs("read")
    mine = (promotions.c.workspace_id == caller.workspace_id) & promotions.c.rolled_back_at.is_(None)
    found: dict[str, Promotion] = {}
    for promotion in reversed(await _found(store, select(promotions).where(mine), PAGE)):
        found[promotion.alias] = promotion
    aliases = registry.aliases()
    return {alias: promotion for alias, promotion in found.items() if aliases.get(alias) == promotion.to_name}


async def behind(store: Store, alias: str, name: str) -> Promotion | None:
    """The promotion, of whatever workspace, by which an alias points at a name."""
    mine = (promotions.c.alias == alias) & promotions.c.rolled_back_at.is_(None)
    last = await _found(store, select(promotions).where(mine), 1)
    return last[0] if last and last[0].to_name == name else None


def whose(caller: Caller) -> str:
    """How a promotion names who did it."""
    if caller.key_id is None:
        return COMMAND_LINE if caller.user_id is None else caller.user_id
    return caller.key_id if caller.user_id is None else f"{caller.key_id} for {caller.user_id}"


async def _found(store: Store, query: Any, limit: int) -> list[Promotion]:
    order = promotions.c.created_at.desc(), promotions.c.id.desc()
    async with store.database.reading() as connection:
        rows: Sequence[Any] = (await connection.execute(query.order_by(*order).limit(min(limit, PAGE)))).all()
    return [Promotion(**{**row._mapping, "replay": Replay(**json.loads(row.replay))}) for row in rows]
