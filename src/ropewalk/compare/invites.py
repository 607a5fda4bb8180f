"""Invitations to vote: a signed link for a colleague without a key. One link is one voter, however many open it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from ropewalk.compare.records import get_comparison
from ropewalk.compare.tables import comparisons
from ropewalk.compare.voters import VOTE, Who, seeing
from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import workspaces
from ropewalk.vault import derive

DAYS, MOST_DAYS = 7, 60
DAY = 24 * 3600 * 1_000_000
PURPOSE = "invitation to vote"
LONGEST = 8192  # characters of a token


@dataclass(frozen=True)
class Invited:
    """Who a link stands for; the caller may vote on one comparison, and nothing else."""

    caller: Caller
    who: Who
    comparison_id: str
    expires_at: int


async def invite(
    store: Store, caller: Caller, comparison_id: str, *, days: float = DAYS, trainer_of: Sequence[str] = ()
) -> str:
    """A new link's token, for one more person; `trainer_of` names candidates that this person trained."""
    caller.needs("write")
    if not 0 < days <= MOST_DAYS:
        raise BadInput(f"days is {days:g}; an invitation lasts more than nothing and at most {MOST_DAYS}")
    found = await get_comparison(store, caller, comparison_id)
    if unknown := set(trainer_of) - {item.candidate_id for item in found.items}:
        raise BadInput(f"trainer_of: '{min(unknown)[:128]}' is no candidate of this comparison")
    told = {
        "comparison": found.id,
        "user": caller.user_id,
        "person": secrets.token_urlsafe(16),
        "trainer_of": list(trainer_of),
        "until": now() + round(days * DAY),
    }
    content = json.dumps(told, separators=(",", ":")).encode()
    return f"{_text(content)}.{_text(_proof(store, content))}"


async def accept(store: Store, token: str) -> Invited:
    """Whom a token stands for; NotFound for one that was not signed here, whose time is over, or whose comparison is gone."""
    told = _read(store, token)
    if told is None or told["until"] <= now():
        raise gone()
    columns = workspaces.c.id, workspaces.c.organization_id
    async with store.database.reading() as connection:
        open = workspaces.c.archived_at.is_(None) & workspaces.c.sealed_key.is_not(None)
        query = select(*columns).join(comparisons, comparisons.c.workspace_id == workspaces.c.id)
        row = (await connection.execute(query.where(comparisons.c.id == told["comparison"], open))).first()
    if row is None:
        raise gone()
    caller = Caller(row.organization_id, row.id, None, told["user"], frozenset({VOTE}))
    await get_comparison(store, seeing(caller), told["comparison"])
    person = Who("invite", told["person"], told["comparison"], tuple(told["trainer_of"]))
    return Invited(caller, person, told["comparison"], told["until"])


def gone() -> NotFound:
    """The same words whatever is wrong with a link."""
    return NotFound("This invitation has expired, or never was one; ask who sent it for another.")


def _proof(store: Store, content: bytes) -> bytes:
    return hmac.digest(derive(store.pepper, PURPOSE), content, hashlib.sha256)


def _read(store: Store, token: str) -> dict[str, Any] | None:
    head, _, tail = token.partition(".")
    try:
        content, proof = _bytes(head), _bytes(tail)
    except (ValueError, binascii.Error):
        return None
    if len(token) > LONGEST or not hmac.compare_digest(proof, _proof(store, content)):
        return None
    found: dict[str, Any] = json.loads(content)
    return found


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
