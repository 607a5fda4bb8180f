"""Sending the digest: once a week, by one process, and to nobody twice.

A digest's row is leased by the process that sends it, and each sending is a row that is claimed before the mail goes out. A mail that a
server did not take is tried again an hour later; one of which it is not known, because the connection or the process ended, is not.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, update

from ropewalk.compare.digest import Digest, Item, due, for_reader, gather
from ropewalk.compare.digest_mail import html_of, subject_of, text_of
from ropewalk.compare.mail import Mailer, compose
from ropewalk.compare.subscribers import Recipient, forget_unconfirmed, recipients
from ropewalk.compare.tables import digest_items, digest_sendings, digests, subscribers
from ropewalk.database import now
from ropewalk.errors import MailFailed, OutputError
from ropewalk.failpoints import failpoint
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import workspaces

MINUTE = 60 * 1_000_000
LEASE = 10 * MINUTE
AGAIN = 60 * MINUTE  # after a failure
TRIES = 24
FAILURES = 3  # in a row: the mail server is not there, and the others wait too


@dataclass(frozen=True)
class Sent:
    """What one round did."""

    sent: int = 0
    failed: int = 0  # to be tried again
    refused: int = 0  # not tried again
    nothing: int = 0  # readers for whom nothing changed


async def send_due(store: Store, mailer: Mailer) -> Sent:
    """Sends the digest of the last week that ended to whoever has not got it; what another process is sending is left to it."""
    await forget_unconfirmed(store)
    week, since, until = due(now(), mailer.settings.weekday, mailer.settings.digest_hour)
    total = Sent()
    for caller in await _readers(store, until):
        done = await _Round(store, mailer, caller).run(week, since, until)
        total = Sent(*(getattr(total, name) + getattr(done, name) for name in Sent.__dataclass_fields__))
    return total


async def _readers(store: Store, until: int) -> list[Caller]:
    """Workspaces with somebody who reads."""
    alive = workspaces.c.archived_at.is_(None) & workspaces.c.sealed_key.is_not(None)
    reads = (subscribers.c.state == "active") & (subscribers.c.confirmed_at < until)
    query = select(workspaces.c.id, workspaces.c.organization_id).distinct()
    query = query.join(subscribers, subscribers.c.workspace_id == workspaces.c.id).where(alive, reads)
    async with store.database.reading() as connection:
        rows = (await connection.execute(query.order_by(workspaces.c.id))).all()
    return [Caller(row.organization_id, row.id, None) for row in rows]


class _Round:
    """One process at one workspace's digest."""

    def __init__(self, store: Store, mailer: Mailer, caller: Caller) -> None:
        self.store, self.mailer, self.caller = store, mailer, caller
        self.holder = secrets.token_hex(8)
        self.id = ""

    async def run(self, week: str, since: int, until: int) -> Sent:
        digest = await self._claim(week, since, until)
        if digest is None:
            return Sent()
        counts = {"sent": 0, "failed": 0, "refused": 0, "nothing": 0}
        in_a_row, later = 0, False
        async with self.store.database.reading() as connection:
            everybody = await recipients(connection, self.store, self.caller.workspace_id, until)
        for reader in everybody:
            if in_a_row == FAILURES:
                later = True
                break
            if not await self._keep():
                return Sent(**counts)  # we were believed dead, and another goes on
            state = await self._send(digest, reader)
            if state is not None:
                counts[state] += 1
                in_a_row = in_a_row + 1 if state == "failed" else 0
        await self._release(later)
        return Sent(**counts)

    async def _claim(self, week: str, since: int, until: int) -> Digest | None:
        """The digest, made at the first time; None where it is done, or another process has it."""
        moment = now()
        mine = (digests.c.workspace_id == self.caller.workspace_id) & (digests.c.week == week)
        async with self.store.database.reading() as connection:
            known = (await connection.execute(select(digests).where(mine))).first()
        if known is not None and (known.sent_at is not None or known.lease_until > moment):
            return None
        async with self.store.database.writing() as connection:
            row = {
                "id": new_id("digest"),
                "workspace_id": self.caller.workspace_id,
                "week": week,
                "since": since,
                "until": until,
                "created_at": moment,
                "lease_until": 0,
            }
            made = await connection.execute(self.store.database.upsert(digests).values(row).on_conflict_do_nothing())
            if made.rowcount:
                items = await gather(connection, self.caller.workspace_id, since, until)
                rows = [
                    {"digest_id": row["id"], "number": number, "kind": item.kind, "ref": item.ref, "content": item.content()}
                    for number, item in enumerate(items, 1)
                ]
                if rows:
                    await connection.execute(insert(digest_items), rows)
            free = digests.c.sent_at.is_(None) & (digests.c.lease_until <= moment)
            held = {"holder": self.holder, "lease_until": moment + LEASE}
            taken = await connection.execute(update(digests).where(mine, free).values(held).returning(digests.c.id))
            self.id = taken.scalar() or ""
            if not self.id:
                return None
            kept = select(digest_items).where(digest_items.c.digest_id == self.id).order_by(digest_items.c.number)
            return Digest(week, since, until, tuple(_item(row) for row in await connection.execute(kept)))

    async def _keep(self) -> bool:
        """Renews the lease."""
        mine = (digests.c.id == self.id) & (digests.c.holder == self.holder)
        async with self.store.database.writing() as connection:
            done = await connection.execute(update(digests).where(mine).values(lease_until=now() + LEASE))
            return bool(done.rowcount)

    async def _send(self, digest: Digest, reader: Recipient) -> str | None:
        """What became of one reader's mail; None where it was sent or given up before, or is not to be tried yet."""
        if not await self._claim_reader(reader):
            return None
        one = Caller(self.caller.organization_id, self.caller.workspace_id, None, reader.user_id)
        items = await for_reader(self.store, one, reader.identity_hash, digest.items)
        own = Digest(digest.week, digest.since, digest.until, items)
        state, error = "sent", None
        if not own.news:
            state = "nothing"
        else:
            leave_url = f"{self.mailer.settings.url}/digest/unsubscribe?token={reader.leave_token}"
            texts = (text_of(own, self.mailer.settings.url, leave_url), html_of(own, self.mailer.settings.url, leave_url))
            message = compose(self.mailer.settings, reader.address, subject_of(own), *texts, leave_url)
            failpoint("digest.claimed")
            try:
                await self.mailer.send(message)
            except (MailFailed, OutputError) as failure:
                again = not isinstance(failure, MailFailed) or failure.again
                state, error = ("failed" if again else "refused"), str(failure)
            failpoint("digest.sent")
        async with self.store.database.writing() as connection:
            told = {"state": state, "error": error, "at": now()}
            await connection.execute(update(digest_sendings).where(self._of(reader)).values(told))
        return state

    async def _claim_reader(self, reader: Recipient) -> bool:
        moment = now()
        row = {"digest_id": self.id, "subscriber_id": reader.id, "state": "claimed", "tries": 1, "at": moment}
        sendings = digest_sendings
        failed = (sendings.c.state == "failed") & (sendings.c.at <= moment - AGAIN) & (sendings.c.tries < TRIES)
        again = {"state": "claimed", "tries": sendings.c.tries + 1, "at": moment}
        here = (subscribers.c.id == reader.id) & (subscribers.c.state == "active")
        async with self.store.database.writing() as connection:
            if (await connection.execute(select(subscribers.c.id).where(here))).first() is None:
                return False  # left since this round began
            new = await connection.execute(self.store.database.upsert(sendings).values(row).on_conflict_do_nothing())
            if new.rowcount:
                return True
            done = await connection.execute(update(sendings).where(self._of(reader), failed).values(again))
            return bool(done.rowcount)

    async def _release(self, later: bool) -> None:
        """Gives the digest back; it is done when everybody's mail was sent or given up."""
        mine = (digests.c.id == self.id) & (digests.c.holder == self.holder)
        open = (digest_sendings.c.state == "failed") & (digest_sendings.c.tries < TRIES)
        query = select(digest_sendings.c.subscriber_id).where(digest_sendings.c.digest_id == self.id, open)
        async with self.store.database.writing() as connection:
            waiting = later or (await connection.execute(query.limit(1))).first() is not None
            values: dict[str, Any] = {"holder": None, "lease_until": now() + AGAIN if later else 0}
            if not waiting:
                values["sent_at"] = now()
            await connection.execute(update(digests).where(mine).values(values))

    def _of(self, reader: Recipient) -> Any:
        return (digest_sendings.c.digest_id == self.id) & (digest_sendings.c.subscriber_id == reader.id)


def _item(row: Any) -> Item:
    return Item(row.kind, row.ref, **json.loads(row.content))
