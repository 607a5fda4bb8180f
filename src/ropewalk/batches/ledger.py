"""Batches of messages as they are written down: requests are claimed under a lease, and each is answered once.

create      rows of requests in portions while they come, then `complete`: a batch is there as a whole, or not at all
claim       a lease on some requests; whoever holds it renews it, and after a crash it runs out
answer      the result and the batch's counts in one transaction, only where there is no result yet; the last one ends the batch

Requests and results are sealed under a key of the batch, which the workspace's key wraps: deleting the batch destroys it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.batches.tables import batch_items, batches
from ropewalk.database import Database, now
from ropewalk.errors import BadInput, NotFound
from ropewalk.failpoints import failpoint
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import workspaces
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.vault import Vault, new_key, unwrap, wrap

HOUR = 3600 * 1_000_000
LIFE = 24 * HOUR  # what is not answered by then has expired
KEPT = 29 * 24 * HOUR  # results, after the batch was created
PORTION, PORTION_BYTES = 500, 4 << 20  # of one transaction
PAGE = 100  # results read at once

Outcome = Literal["succeeded", "errored", "canceled", "expired"]
Asked = tuple[str, Mapping[str, Any]]  # custom_id, params


@dataclass(frozen=True)
class Batch:
    """One batch, and how far it is."""

    id: str
    organization_id: str
    workspace_id: str
    user_id: str | None
    key_id: str | None
    rights: str
    version: str
    sealed_key: bytes | None
    total: int
    unanswered: int
    succeeded: int
    errored: int
    canceled: int
    expired: int
    created_at: int
    expires_at: int
    cancel_initiated_at: int | None
    ended_at: int | None
    archived_at: int | None

    @property
    def owner(self) -> Caller:
        """Who sent it: its requests are answered in their name."""
        rights = frozenset(filter(None, self.rights.split(" ")))
        return Caller(self.organization_id, self.workspace_id, self.key_id, self.user_id, rights)


@dataclass(frozen=True)
class Item:
    """One request of a batch, claimed."""

    batch: Batch
    number: int
    custom_id: str
    params: Mapping[str, Any]
    tries: int  # this one included


@dataclass(frozen=True)
class Page:
    """Batches, newest first."""

    batches: tuple[Batch, ...]
    more: bool


COLUMNS = [batches.c[field.name] for field in fields(Batch)]


class Ledger:
    """The batches of one installation, as one process sees them."""

    def __init__(self, database: Database, vault: Vault, lease_seconds: float = 20.0) -> None:
        self.database, self.vault = database, vault
        self.lease = round(lease_seconds * 1_000_000)
        self.holder = secrets.token_hex(8)
        self._last = ""  # the workspace that had the last turn

    # -- what clients ask for

    async def create(self, caller: Caller, version: str, asked: AsyncIterable[Sequence[Asked]], id: str | None = None) -> Batch:
        """A batch of these requests, written down while they come; durable when it returns, and no more if they come to no end."""
        caller.needs("write")
        id, moment, key = id or new_id("msgbatch"), now(), new_key()
        async with self.database.reading() as connection:
            sealed = wrap(await workspace_key(connection, self.vault, caller.workspace_id), key, _purpose(id))
        batch = Batch(
            id=id,
            organization_id=caller.organization_id,
            workspace_id=caller.workspace_id,
            user_id=caller.user_id,
            key_id=caller.key_id,
            rights=" ".join(sorted(caller.rights)),
            version=version,
            sealed_key=sealed,
            total=0,
            unanswered=0,
            succeeded=0,
            errored=0,
            canceled=0,
            expired=0,
            created_at=moment,
            expires_at=moment + LIFE,
            cancel_initiated_at=None,
            ended_at=None,
            archived_at=None,
        )
        row = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        async with self.database.writing() as connection:
            await connection.execute(insert(batches).values(**row, complete=False))
        failpoint("batch.begun")
        try:
            count = await self._take_in(id, key, asked)
        except BaseException:
            async with self.database.writing() as connection:
                await _drop(connection, [id])
            raise
        moment = now()  # its day begins when it is there
        batch = replace(batch, total=count, unanswered=count, created_at=moment, expires_at=moment + LIFE)
        whole = {name: getattr(batch, name) for name in ("total", "unanswered", "created_at", "expires_at")}
        async with self.database.writing() as connection:
            await connection.execute(update(batches).where(batches.c.id == id).values(complete=True, **whole))
        failpoint("batch.complete")
        return batch

    async def _take_in(self, id: str, key: bytes, asked: AsyncIterable[Sequence[Asked]]) -> int:
        """Writes requests down, sealed, in portions; how many they were."""
        rows: list[dict[str, Any]] = []
        count = 0

        async def write() -> None:
            async with self.database.writing() as connection:
                await connection.execute(insert(batch_items), rows)
            rows.clear()
            failpoint("batch.portion")

        async for some in asked:
            for begin in range(0, len(some), PORTION):
                group = some[begin : begin + PORTION]
                rows += await asyncio.to_thread(_rows, id, key, count, group)
                count += len(group)
                if len(rows) >= PORTION or sum(len(row["request"]) for row in rows) >= PORTION_BYTES:
                    await write()
        if rows:
            await write()
        return count

    async def show(self, caller: Caller, id: str) -> Batch:
        """One batch; NotFound also for another's."""
        caller.needs("read")
        async with self.database.reading() as connection:
            return await self._find(connection, caller, id)

    async def list(self, caller: Caller, limit: int, after: str | None = None, before: str | None = None) -> Page:
        """A page, newest first: what stands after one batch, before another, or both. Nothing stands beside one that is not there."""
        caller.needs("read")
        place = tuple_(batches.c.created_at, batches.c.id)
        query = select(*COLUMNS).where(_visible(caller))
        async with self.database.reading() as connection:
            for id, is_after in ((after, True), (before, False)):
                if id is None:
                    continue
                try:
                    found = await self._find(connection, caller, id)
                except NotFound:
                    return Page((), False)
                edge = (found.created_at, found.id)
                query = query.where(place < edge if is_after else place > edge)
            upward = before is not None and after is None  # the page that ends there
            order = [column if upward else column.desc() for column in (batches.c.created_at, batches.c.id)]
            rows = (await connection.execute(query.order_by(*order).limit(limit + 1))).all()
        found_rows = [_batch(row) for row in rows[:limit]]
        return Page(tuple(found_rows[::-1] if upward else found_rows), len(rows) > limit)

    async def cancel(self, caller: Caller, id: str) -> Batch:
        """What nobody has begun to answer is not answered any more; the batch as it is now. One that has ended stays as it is."""
        caller.needs("write")
        async with self.database.writing() as connection:
            await self._find(connection, caller, id)
            going = (batches.c.id == id) & batches.c.ended_at.is_(None) & batches.c.cancel_initiated_at.is_(None)
            await connection.execute(update(batches).where(going).values(cancel_initiated_at=now()))
            return await self._find(connection, caller, id)

    async def delete(self, caller: Caller, id: str) -> None:
        """Forgets a batch that has ended, and destroys the key of its results."""
        caller.needs("write")
        async with self.database.writing() as connection:
            found = await self._find(connection, caller, id)
            if found.ended_at is None:
                raise BadInput(
                    f"Message batch `{id}` is still being processed; cancel it, and delete it once its processing_status is ended."
                )
            await _drop(connection, [id])

    async def results(self, caller: Caller, id: str) -> AsyncIterator[tuple[str, Outcome, Any]]:
        """(custom_id, outcome, result) of each request of a batch that has ended; the error comes before the first result."""
        found = await self.show(caller, id)
        if found.ended_at is None:
            raise BadInput(f"Message batch `{id}` is still being processed; its results are there once it has ended.")
        if found.archived_at is not None or now() >= found.created_at + KEPT:
            raise NotFound(f"The results of message batch `{id}` were kept for 29 days and are erased.")
        async with self.database.reading() as connection:
            key = await self._key(connection, found)
        return self._results(found, key)

    async def _results(self, batch: Batch, key: bytes) -> AsyncIterator[tuple[str, Outcome, Any]]:
        last = -1
        while True:
            async with self.database.reading() as connection:
                query = select(batch_items).where(batch_items.c.batch_id == batch.id, batch_items.c.number > last)
                rows = (await connection.execute(query.order_by(batch_items.c.number).limit(PAGE))).all()
            if not rows:
                return
            for row in rows:
                result = None if row.result is None else _opened(key, row.result, f"result {row.number}")
                yield row.custom_id, row.outcome, result
            last = rows[-1].number

    # -- what a worker does

    async def find(self, id: str) -> Batch | None:
        """A batch of any workspace's, for who works on it."""
        async with self.database.reading() as connection:
            row = (await connection.execute(select(*COLUMNS).where(batches.c.id == id))).first()
        return None if row is None else _batch(row)

    async def claim(self, most: int) -> Sequence[Item]:
        """Requests to answer, of one batch: workspaces take turns, and of each the oldest batch comes first."""
        moment = now()
        going = batches.c.complete & batches.c.ended_at.is_(None) & batches.c.cancel_initiated_at.is_(None)
        active = workspaces.c.archived_at.is_(None) & workspaces.c.sealed_key.is_not(None)
        query = select(*COLUMNS).join(workspaces, workspaces.c.id == batches.c.workspace_id)
        query = query.where(going, active, batches.c.expires_at > moment).order_by(batches.c.created_at, batches.c.id)
        async with self.database.reading() as connection:
            waiting = [_batch(row) for row in (await connection.execute(query)).all()]
        waiting.sort(key=lambda batch: (batch.workspace_id <= self._last, batch.workspace_id))  # stable: the oldest stays first
        for batch in waiting:
            if items := await self._claim(batch, most):
                self._last = batch.workspace_id
                return items
        return []

    async def _claim(self, batch: Batch, most: int) -> Sequence[Item]:
        moment, items = now(), batch_items.c
        free = (items.batch_id == batch.id) & items.outcome.is_(None) & (items.lease_until <= moment)
        async with self.database.reading() as connection:
            if (await connection.execute(select(items.number).where(free).limit(1))).first() is None:
                return []
            key = await self._key(connection, batch)
        async with self.database.writing() as connection:
            chosen = select(batch_items).where(free).order_by(items.number).limit(most).with_for_update(skip_locked=True)
            rows = (await connection.execute(chosen)).all()
            held = {"holder": self.holder, "lease_until": moment + self.lease, "tries": items.tries + 1}
            numbers = [row.number for row in rows]
            await connection.execute(
                update(batch_items).where(items.batch_id == batch.id, items.number.in_(numbers)).values(held)
            )
        failpoint("batch.claimed")
        return [
            Item(batch, row.number, row.custom_id, _opened(key, row.request, f"request {row.number}"), row.tries + 1)
            for row in rows
        ]

    async def renew(self) -> None:
        """Says that this process is alive."""
        mine = (batch_items.c.holder == self.holder) & batch_items.c.outcome.is_(None)
        going = select(batches.c.id).where(batches.c.ended_at.is_(None))
        async with self.database.writing() as connection:
            held = update(batch_items).where(batch_items.c.batch_id.in_(going), mine)
            await connection.execute(held.values(lease_until=now() + self.lease))

    async def release(self, item: Item, seconds: float = 0.0, *, counted: bool = False) -> None:
        """Gives a request back, to be tried again after so many seconds; `counted`: it has had its try."""
        mine = _is(item) & (batch_items.c.holder == self.holder)
        values = {"holder": None, "lease_until": now() + round(seconds * 1_000_000)}
        if not counted:
            values["tries"] = item.tries - 1
        async with self.database.writing() as connection:
            await connection.execute(update(batch_items).where(mine).values(values))

    async def answer(self, item: Item, outcome: Outcome, result: Mapping[str, Any]) -> bool:
        """Writes down what came of a request; False where that was done before."""
        async with self.database.writing() as connection:
            await _lock(connection, item.batch.id)
            key = await self._key(connection, item.batch)
            values = {"outcome": outcome, "result": _sealed(key, result, f"result {item.number}"), "request": None}
            done = await connection.execute(update(batch_items).where(_is(item)).values(values))
            if done.rowcount:
                await _count(connection, item.batch.id, outcome, 1)
            failpoint("batch.answering")
        failpoint("batch.answered")
        return bool(done.rowcount)

    # -- what time does

    async def settle(self) -> None:
        """Ends what was cancelled and what has expired, erases old results, and what was never sent to its end."""
        moment = now()
        going = batches.c.complete & batches.c.ended_at.is_(None)
        stopped = batches.c.cancel_initiated_at.is_not(None) | (batches.c.expires_at <= moment)
        old = batches.c.archived_at.is_(None) & batches.c.ended_at.is_not(None) & (batches.c.created_at <= moment - KEPT)
        lost = ~batches.c.complete & (batches.c.created_at <= moment - LIFE)  # no body comes for so long
        async with self.database.reading() as connection:
            rows = (await connection.execute(select(*COLUMNS, batches.c.complete).where((going & stopped) | old | lost))).all()
        for row in rows:
            async with self.database.writing() as connection:
                if not row.complete:
                    await _drop(connection, [row.id])
                elif row.ended_at is not None:
                    await _drop_items(connection, [row.id])
                    archived = {"archived_at": moment, "sealed_key": None}
                    await connection.execute(update(batches).where(batches.c.id == row.id).values(archived))
                else:
                    await _stop(connection, _batch(row), moment)

    async def _find(self, connection: AsyncConnection, caller: Caller, id: str) -> Batch:
        row = None
        if id.isascii() and id.isprintable() and len(id) <= 128:
            row = (await connection.execute(select(*COLUMNS).where(batches.c.id == id, _visible(caller)))).first()
        if row is None:
            raise NotFound(f"Message batch `{id[:200]}` not found.")
        return _batch(row)

    async def _key(self, connection: AsyncConnection, batch: Batch) -> bytes:
        assert batch.sealed_key is not None
        return unwrap(await workspace_key(connection, self.vault, batch.workspace_id), batch.sealed_key, _purpose(batch.id))


async def forget(database: Database, workspace_id: str) -> None:
    """Drops all batches of a workspace that is no more."""
    async with database.writing() as connection:
        mine = select(batches.c.id).where(batches.c.workspace_id == workspace_id)
        await _drop(connection, (await connection.execute(mine)).scalars().all())


async def drop(database: Database, id: str) -> None:
    """Drops a batch, answered or not, with all that it was asked and told."""
    async with database.writing() as connection:
        await _drop(connection, [id])


def _visible(caller: Caller) -> ColumnElement[bool]:
    mine = batches.c.complete & (batches.c.workspace_id == caller.workspace_id)
    return mine if caller.user_id is None else mine & (batches.c.user_id == caller.user_id)


def _is(item: Item) -> ColumnElement[bool]:
    same = (batch_items.c.batch_id == item.batch.id) & (batch_items.c.number == item.number)
    return same & batch_items.c.outcome.is_(None)


async def _stop(connection: AsyncConnection, batch: Batch, moment: int) -> None:
    """Nothing more is answered; what somebody is working on still may be, unless the batch's time is over."""
    outcome: Outcome = "expired" if batch.expires_at <= moment else "canceled"
    left = (batch_items.c.batch_id == batch.id) & batch_items.c.outcome.is_(None)
    if outcome == "canceled":
        left &= batch_items.c.lease_until <= moment
    await _lock(connection, batch.id)
    ended = await connection.execute(update(batch_items).where(left).values(outcome=outcome, request=None))
    if ended.rowcount:
        await _count(connection, batch.id, outcome, ended.rowcount)


async def _lock(connection: AsyncConnection, id: str) -> None:
    """The batch's row is taken first by whoever counts, so that no two wait for each other."""
    await connection.execute(select(batches.c.id).where(batches.c.id == id).with_for_update())


async def _count(connection: AsyncConnection, id: str, outcome: Outcome, more: int) -> None:
    column = batches.c[outcome]
    counted = (
        update(batches).where(batches.c.id == id).values({column: column + more, "unanswered": batches.c.unanswered - more})
    )
    left = (await connection.execute(counted.returning(batches.c.unanswered))).scalar_one()
    if left == 0:
        await connection.execute(update(batches).where(batches.c.id == id).values(ended_at=now()))


async def _drop(connection: AsyncConnection, ids: Sequence[str]) -> None:
    await _drop_items(connection, ids)
    await connection.execute(delete(batches).where(batches.c.id.in_(ids)))


async def _drop_items(connection: AsyncConnection, ids: Sequence[str]) -> None:
    await connection.execute(delete(batch_items).where(batch_items.c.batch_id.in_(ids)))


def _rows(id: str, key: bytes, first: int, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Rows of requests, sealed."""
    free = {"batch_id": id, "lease_until": 0, "tries": 0}
    return [
        {**free, "number": number, "custom_id": custom_id, "request": _sealed(key, params, f"request {number}")}
        for number, (custom_id, params) in enumerate(asked, first)
    ]


def _sealed(key: bytes, content: Mapping[str, Any], purpose: str) -> bytes:
    return wrap(key, json.dumps(content, separators=(",", ":")).encode(), purpose)


def _opened(key: bytes, sealed: bytes, purpose: str) -> Any:
    return json.loads(unwrap(key, sealed, purpose))


def _purpose(id: str) -> str:
    return f"batch {id}"


def _batch(row: Any) -> Batch:
    return Batch(**{field.name: getattr(row, field.name) for field in fields(Batch)})
