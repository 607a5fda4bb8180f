"""Who gets the weekly digest: an address that asked for it and then confirmed, until it leaves with one click.

An address is sealed under its workspace's key and found by a keyed hash. The token that confirms is random, the one that leaves is made
from the installation's pepper, so that it is the same in every mail; the database holds digests of both.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.digest_mail import confirmation
from ropewalk.compare.mail import Mailer, check_address, compose
from ropewalk.compare.tables import subscribers
from ropewalk.compare.voters import identity_hash, who
from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound, RateLimited
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import find_workspace, workspace_key
from ropewalk.vault import derive, unwrap, wrap

MINUTE = 60 * 1_000_000
DAY = 24 * 60 * MINUTE
CONFIRM = 2 * DAY  # so long an address may take to confirm
BETWEEN = 10 * MINUTE  # two mails that ask one address to confirm
MOST_PENDING = 50  # addresses of one workspace that were asked within a day


@dataclass(frozen=True)
class Subscriber:
    """One address, which stays sealed."""

    id: str
    workspace_id: str
    user_id: str | None  # whose comparisons it is told of; None: the workspace's
    state: Literal["pending", "active", "gone"]
    created_at: int
    confirmed_at: int | None


@dataclass(frozen=True)
class Recipient:
    """One who gets mail."""

    id: str
    address: str
    user_id: str | None
    identity_hash: bytes | None
    leave_token: str


async def subscribe(store: Store, caller: Caller, mailer: Mailer | None, address: str) -> None:
    """Asks an address by mail whether it wants the digest; one that gets it already is asked nothing, and nobody is told."""
    caller.needs("read")
    if mailer is None:
        raise BadInput("this server sends no mail: whoever runs it names a mail server, `ropewalk serve --mail mail.yml`")
    found, token = check_address(address), secrets.token_urlsafe(32)
    mail_hash, moment = _mail_hash(store, found), now()
    here = subscribers.c.workspace_id == caller.workspace_id
    async with store.database.writing() as connection:
        workspace = await find_workspace(connection, caller.workspace_id)
        mine = here & (subscribers.c.mail_hash == mail_hash)
        known = (await connection.execute(select(subscribers).where(mine).with_for_update())).first()
        if known is not None and known.state == "active":
            return
        if known is not None and known.state == "pending" and known.created_at > moment - BETWEEN:
            raise RateLimited("this address was just asked to confirm; look there, or try again in ten minutes", BETWEEN / 1e6)
        await _check_pending(connection, caller, moment)
        id = known.id if known is not None else new_id("subscriber")
        key = await workspace_key(connection, store.vault, caller.workspace_id)
        row = {
            "user_id": caller.user_id,
            "identity_hash": identity_hash(store, who(caller)),
            "sealed_mail": wrap(key, found.encode(), _purpose(id)),
            "state": "pending",
            "confirm_hash": _digest(token),
            "leave_hash": _digest(leave_token(store, id)),
            "created_at": moment,
            "confirmed_at": None,
            "gone_at": None,
        }
        if known is not None:
            await connection.execute(update(subscribers).where(mine).values(row))
        else:
            new = {"id": id, "workspace_id": caller.workspace_id, "mail_hash": mail_hash, **row}
            await connection.execute(store.database.upsert(subscribers).values(new).on_conflict_do_nothing())
    subject, text, html = confirmation(workspace.name, f"{mailer.settings.url}/digest/confirm?token={token}")
    try:
        await mailer.send(compose(mailer.settings, found, subject, text, html))
    except BaseException:
        async with store.database.writing() as connection:  # as if it had not been asked
            unasked = (subscribers.c.id == id) & (subscribers.c.state == "pending")
            await connection.execute(delete(subscribers).where(unasked))
        raise


async def confirm(store: Store, token: str) -> None:
    """The address wants it; once more changes nothing. NotFound for a token that is none, is too old, or whose address has left."""
    moment = now()
    asked = subscribers.c.confirm_hash == _digest(token)
    async with store.database.writing() as connection:
        row = (await connection.execute(select(subscribers).where(asked).with_for_update())).first()
        if row is None or row.state == "gone" or (row.state == "pending" and row.created_at <= moment - CONFIRM):
            raise NotFound("This link has expired, or never was one; subscribe again to get another.")
        if row.state == "pending":
            active = {"state": "active", "confirmed_at": moment}
            await connection.execute(update(subscribers).where(subscribers.c.id == row.id).values(active))


async def unsubscribe(store: Store, token: str) -> None:
    """The address leaves, and is erased; once more changes nothing. NotFound for a token that is none."""
    gone = {
        "state": "gone",
        "sealed_mail": None,
        "identity_hash": None,
        "confirm_hash": None,
        "gone_at": func.coalesce(subscribers.c.gone_at, now()),
    }
    async with store.database.writing() as connection:
        done = await connection.execute(update(subscribers).where(subscribers.c.leave_hash == _digest(token)).values(gone))
    if not done.rowcount:
        raise NotFound("This link never was one of ours, or it was cut off; use the one at the end of a digest.")
    await store.database.forget()


async def list_subscribers(store: Store, caller: Caller) -> list[Subscriber]:
    """Who asked for the digest of this workspace, or of this user; newest first, without those who left."""
    caller.needs("read")
    mine = (subscribers.c.workspace_id == caller.workspace_id) & (subscribers.c.state != "gone")
    if caller.user_id is not None:
        mine &= subscribers.c.user_id == caller.user_id
    columns = [subscribers.c[name] for name in Subscriber.__dataclass_fields__]
    query = select(*columns).where(mine).order_by(subscribers.c.created_at.desc(), subscribers.c.id)
    async with store.database.reading() as connection:
        return [Subscriber(**row._mapping) for row in await connection.execute(query)]


async def recipients(connection: AsyncConnection, store: Store, workspace_id: str, before: int) -> list[Recipient]:
    """Who had confirmed before a moment, and has not left."""
    key = await workspace_key(connection, store.vault, workspace_id)
    active = (subscribers.c.workspace_id == workspace_id) & (subscribers.c.state == "active")
    query = select(subscribers).where(active, subscribers.c.confirmed_at < before).order_by(subscribers.c.id)
    return [
        Recipient(
            row.id,
            unwrap(key, row.sealed_mail, _purpose(row.id)).decode(),
            row.user_id,
            bytes(row.identity_hash) if row.identity_hash is not None else None,
            leave_token(store, row.id),
        )
        for row in await connection.execute(query)
    ]


async def forget_unconfirmed(store: Store) -> None:
    """Erases addresses that were asked and did not answer."""
    late = (subscribers.c.state == "pending") & (subscribers.c.created_at <= now() - CONFIRM)
    async with store.database.reading() as connection:
        if (await connection.execute(select(subscribers.c.id).where(late).limit(1))).first() is None:
            return
    async with store.database.writing() as connection:
        await connection.execute(delete(subscribers).where(late))
    await store.database.forget()


def leave_token(store: Store, id: str) -> str:
    """What one click leaves with: the same in every mail to one subscriber."""
    proof = hmac.digest(derive(store.pepper, "leaving the digest"), id.encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(proof).decode().rstrip("=")


async def _check_pending(connection: AsyncConnection, caller: Caller, moment: int) -> None:
    """A server that asks whatever address it is given could be made to flood strangers."""
    asked = (subscribers.c.workspace_id == caller.workspace_id) & (subscribers.c.state == "pending")
    query = select(func.count()).select_from(subscribers).where(asked, subscribers.c.created_at > moment - DAY)
    if int(await connection.scalar(query) or 0) >= MOST_PENDING:
        raise RateLimited(
            f"{MOST_PENDING} addresses have been asked today and have not confirmed; try again tomorrow", DAY / 1e6
        )


def _mail_hash(store: Store, address: str) -> bytes:
    return hmac.digest(derive(store.pepper, "subscribers"), address.casefold().encode(), hashlib.sha256)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _purpose(id: str) -> str:
    return f"subscriber {id}"
