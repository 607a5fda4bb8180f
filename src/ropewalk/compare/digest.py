"""The digest: what changed in a week. New verdicts, what was shipped and taken back, verdicts whose suite has changed since, and
comparisons that wait for a vote. Where nothing changed there is nothing to tell, and nothing is sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.records import Comparison, get_comparison
from ropewalk.compare.tables import candidates, comparisons, promotions, suites, verdicts
from ropewalk.compare.vote_counts import not_voted_on
from ropewalk.compare.voters import identity_hash, seeing, who
from ropewalk.database import EPOCH, now
from ropewalk.errors import NotFound
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

Kind = Literal["verdict", "shipped", "rolled_back", "changed", "vote"]
WEEK = timedelta(days=7)
MOST = 50  # items of a kind
VOTABLE = 60  # days for which a comparison waits for votes
TITLE = 120  # characters


@dataclass(frozen=True)
class Item:
    """One thing to tell."""

    kind: Kind
    ref: str  # a comparison; "" for an alias that was moved without one
    title: str
    sentence: str
    new: bool = True  # it came to be in this week
    user_id: str | None = field(default=None, repr=False)  # whose comparison it is about

    def content(self) -> str:
        """What is kept of it, beside kind and ref."""
        told = {"title": self.title, "sentence": self.sentence, "new": self.new, "user_id": self.user_id}
        return json.dumps(told, ensure_ascii=False)


@dataclass(frozen=True)
class Digest:
    """A week's news for one reader."""

    week: str  # ISO, as 2026-W47
    since: int
    until: int
    items: tuple[Item, ...]

    @property
    def news(self) -> bool:
        """Whether there is anything to send."""
        return any(item.new for item in self.items)

    def of(self, kind: Kind) -> list[Item]:
        """The items of one kind."""
        return [item for item in self.items if item.kind == kind]


async def preview(store: Store, caller: Caller) -> Digest:
    """The last seven days, as they would be told to this caller."""
    caller.needs("read")
    until = now()
    since = until - WEEK // timedelta(microseconds=1)
    async with store.database.reading() as connection:
        items = await gather(connection, caller.workspace_id, since, until)
    own = await for_reader(store, caller, identity_hash(store, who(caller)), items)
    return Digest(week_of(until), since, until, own)


async def gather(connection: AsyncConnection, workspace_id: str, since: int, until: int) -> list[Item]:
    """Everything that changed in a workspace between two moments, and what waits for votes."""
    return [
        *await _verdicts(connection, workspace_id, since, until),
        *await _promotions(connection, workspace_id, since, until),
        *await _changed(connection, workspace_id, since, until),
        *await _votable(connection, workspace_id, since, until),
    ]


async def for_reader(store: Store, caller: Caller, identity: bytes | None, items: Sequence[Item]) -> tuple[Item, ...]:
    """What one reader may see of it, and of the votes those that wait for this reader's."""
    seen = [item for item in items if caller.user_id is None or item.user_id == caller.user_id]
    asked = list[Comparison]()
    for item in seen:
        if item.kind == "vote" and identity is not None:
            try:
                asked.append(await get_comparison(store, seeing(caller), item.ref))
            except NotFound:
                continue
    left = {one.id for one in await not_voted_on(store, caller, identity or b"", asked, MOST)}
    return tuple(item for item in seen if item.kind != "vote" or item.ref in left)


def due(moment: int, weekday: int = 0, hour: int = 7) -> tuple[str, int, int]:
    """The last week whose digest is to be sent: its name, its beginning and its end. Weeks end when `weekday` begins, UTC."""
    at = EPOCH + timedelta(microseconds=moment)
    day = at.date() - timedelta(days=(at.weekday() - weekday) % 7)
    if at < datetime.combine(day, time(hour), UTC):
        day -= WEEK
    until = datetime.combine(day, time(), UTC)
    end = _microseconds(until)
    return week_of(end - 1), _microseconds(until - WEEK), end


def week_of(moment: int) -> str:
    """The ISO week of a moment, as 2026-W47."""
    year, week, _ = (EPOCH + timedelta(microseconds=moment)).isocalendar()
    return f"{year}-W{week:02}"


async def _verdicts(connection: AsyncConnection, workspace_id: str, since: int, until: int) -> list[Item]:
    query = (
        select(verdicts, comparisons.c.title, comparisons.c.user_id, candidates.c.name)
        .join(comparisons, comparisons.c.id == verdicts.c.comparison_id)
        .join(candidates, candidates.c.id == verdicts.c.candidate_id)
        .where(comparisons.c.workspace_id == workspace_id, verdicts.c.created_at >= since, verdicts.c.created_at < until)
        .order_by(verdicts.c.created_at.desc(), verdicts.c.edition.desc(), verdicts.c.id)
    )
    last: dict[tuple[str, str], Any] = {}
    for row in await connection.execute(query):
        last.setdefault((row.comparison_id, row.candidate_id), row)
    return [
        Item("verdict", row.comparison_id, _cut(row.title), _verdict_sentence(row), user_id=row.user_id)
        for row in list(last.values())[:MOST]
    ]


def _verdict_sentence(row: Any) -> str:
    said = f"{row.state}: {_cut(row.name)}"
    if None in (row.effect, row.low, row.high):
        return said
    effect, low, high = (100 * value for value in (row.effect, row.low, row.high))
    return f"{said}, {effect:+.1f} points (95 %: {low:+.1f} to {high:+.1f})"


async def _promotions(connection: AsyncConnection, workspace_id: str, since: int, until: int) -> list[Item]:
    moved, back = promotions.c.created_at, promotions.c.rolled_back_at
    query = (
        select(promotions, comparisons.c.title, comparisons.c.user_id)
        .join(comparisons, comparisons.c.id == promotions.c.comparison_id, isouter=True)
        .where(promotions.c.workspace_id == workspace_id)
        .where(((moved >= since) & (moved < until)) | ((back >= since) & (back < until)))
        .order_by(moved.desc(), promotions.c.id)
        .limit(MOST)
    )
    items = list[Item]()
    for row in await connection.execute(query):
        about = {"ref": row.comparison_id or "", "title": _cut(row.alias), "user_id": row.user_id}
        if since <= row.created_at < until:
            said = f"{_cut(row.alias)} now serves {_cut(row.to_name)}"
            if row.override_reason is not None:
                said += f", against the verdict's leave: {_cut(row.override_reason)}"
            items.append(Item("shipped", sentence=said, **about))
        if row.rolled_back_at is not None and since <= row.rolled_back_at < until:
            said = f"{_cut(row.alias)} was taken back from {_cut(row.to_name)} to {_cut(row.from_name or 'nothing')}"
            items.append(Item("rolled_back", sentence=said, **about))
    return items


async def _changed(connection: AsyncConnection, workspace_id: str, since: int, until: int) -> list[Item]:
    """Comparisons that were decided on a suite of which a newer one, by the same name, was made in this week."""
    newer = suites.alias("newer")
    same = (newer.c.workspace_id == suites.c.workspace_id) & (newer.c.name == suites.c.name)
    query = (
        select(comparisons.c.id, comparisons.c.title, comparisons.c.user_id, suites.c.name, suites.c.n_prompts)
        .add_columns(newer.c.n_prompts.label("newer_prompts"), newer.c.id.label("newer_id"))
        .join(suites, suites.c.id == comparisons.c.suite_id)
        .join(newer, same)
        .where(comparisons.c.workspace_id == workspace_id, comparisons.c.state == "done", newer.c.complete)
        .where(newer.c.created_at > suites.c.created_at, newer.c.digest != suites.c.digest)
        .where(newer.c.user_id.is_not_distinct_from(suites.c.user_id))
        .where(newer.c.created_at >= since, newer.c.created_at < until)
        .order_by(comparisons.c.created_at.desc(), newer.c.created_at.desc())
    )
    found: dict[str, Item] = {}
    for row in await connection.execute(query):
        said = f"decided on {row.n_prompts} prompts of {_cut(row.name)}, which now has {row.newer_prompts}: run it again"
        found.setdefault(row.id, Item("changed", row.id, _cut(row.title), said, user_id=row.user_id))
    return list(found.values())[:MOST]


async def _votable(connection: AsyncConnection, workspace_id: str, since: int, until: int) -> list[Item]:
    """Comparisons that have run and whose answers can be voted on."""
    oldest = until - VOTABLE * 24 * 3600 * 1_000_000
    query = (
        select(comparisons.c.id, comparisons.c.title, comparisons.c.user_id, comparisons.c.finished_at)
        .where(comparisons.c.workspace_id == workspace_id, comparisons.c.state == "done", comparisons.c.suite_id.is_not(None))
        .where(comparisons.c.finished_at >= oldest, comparisons.c.finished_at < until)
        .order_by(comparisons.c.finished_at.desc(), comparisons.c.id)
        .limit(MOST)
    )
    said = "waits for your blind vote"
    return [
        Item("vote", row.id, _cut(row.title), said, row.finished_at >= since, row.user_id)
        for row in await connection.execute(query)
    ]


def _cut(text: str) -> str:
    return text if len(text) <= TITLE else text[: TITLE - 1] + "…"


def _microseconds(at: datetime) -> int:
    return (at - EPOCH) // timedelta(microseconds=1)
