"""Voters: who votes, known by a keyed hash alone; what they trained, and who is left out."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.candidates import get_candidate
from ropewalk.compare.tables import comparison_items, labels, lineage, voters
from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound, PermissionDenied
from ropewalk.files.store import Store
from ropewalk.files.tables import files
from ropewalk.ids import new_id
from ropewalk.tenants.caller import RIGHTS, Caller
from ropewalk.vault import derive

VOTE = "vote"  # the one right of whoever was invited by a link
PURPOSE = "voters"
MAX_REASON = 500


@dataclass(frozen=True)
class Who:
    """A person who votes. One person is one voter, however many browsers they use."""

    kind: Literal["user", "key", "local", "invite"]
    identity: str = field(repr=False)
    comparison_id: str | None = None  # the only one that an invitation is for
    trainer_of: tuple[str, ...] = ()  # as who invited them said


@dataclass(frozen=True)
class Voter:
    """What is kept of one."""

    id: str
    trainer_of: frozenset[str]  # candidates
    excluded_reason: str | None


def who(caller: Caller) -> Who:
    """The person behind a caller: its user, else its key, else whoever sits at the machine."""
    if caller.user_id is not None:
        return Who("user", caller.user_id)
    return Who("key", caller.key_id) if caller.key_id is not None else Who("local", "")


def identity_hash(store: Store, person: Who) -> bytes:
    """What a voter is found by; tells nothing without the installation's pepper."""
    text = f"{person.kind}\0{person.identity}"
    return hmac.digest(derive(store.pepper, PURPOSE), text.encode("utf-8", "surrogatepass"), hashlib.sha256)


def needs_vote(caller: Caller) -> None:
    """Raises PermissionDenied for who may neither write nor was invited to vote."""
    if not {"write", VOTE} & caller.rights:
        raise PermissionDenied("this key may not vote: it needs the right 'write'; who has no key can be invited by a link")


def seeing(caller: Caller) -> Caller:
    """The same, for what voting itself has to look at: whoever was invited may ask for nothing but a ticket."""
    return replace(caller, rights=RIGHTS)


async def voter_of(connection: AsyncConnection, store: Store, caller: Caller, person: Who, about: Sequence[str]) -> Voter:
    """The voter, made at the first time and locked until the transaction ends; `about` are the candidates to be voted on."""
    mine = (voters.c.workspace_id == caller.workspace_id) & (voters.c.identity_hash == identity_hash(store, person))
    row = {
        "id": new_id("voter"),
        "workspace_id": caller.workspace_id,
        "identity_hash": identity_hash(store, person),
        "trainer_of": "[]",
        "created_at": now(),
    }
    await connection.execute(store.database.upsert(voters).values(row).on_conflict_do_nothing())
    found = (await connection.execute(select(voters).where(mine).with_for_update())).one()
    known = set(json.loads(found.trainer_of))
    trained = known | set(person.trainer_of) | await _trained(connection, caller, person, about)
    if trained != known:
        told = json.dumps(sorted(trained))
        await connection.execute(update(voters).where(voters.c.id == found.id).values(trainer_of=told))
    return Voter(found.id, frozenset(trained), found.excluded_reason)


async def known_voter(connection: AsyncConnection, caller: Caller, identity: bytes) -> Voter | None:
    """The voter of an identity, if there is one."""
    mine = (voters.c.workspace_id == caller.workspace_id) & (voters.c.identity_hash == identity)
    row = (await connection.execute(select(voters).where(mine))).first()
    return Voter(row.id, frozenset(json.loads(row.trainer_of)), row.excluded_reason) if row is not None else None


async def declare_trainer(store: Store, caller: Caller, person: Who, candidate_ids: Sequence[str]) -> None:
    """Says that this person trained these candidates: their votes on them are counted apart, those before too."""
    needs_vote(caller)
    for id in candidate_ids:
        await get_candidate(store, seeing(caller), id)
    async with store.database.writing() as connection:
        found = await voter_of(connection, store, caller, person, ())
        told = json.dumps(sorted(found.trainer_of | set(candidate_ids)))
        await connection.execute(update(voters).where(voters.c.id == found.id).values(trainer_of=told))
        # Judges are not held against the opinion of who made what they judge.
        theirs = select(comparison_items.c.comparison_id).where(comparison_items.c.candidate_id.in_(candidate_ids))
        own = (labels.c.voter_id == found.id) & labels.c.comparison_id.in_(theirs)
        await connection.execute(delete(labels).where(own))


async def exclude(store: Store, caller: Caller, voter_id: str, reason: str) -> None:
    """Leaves a voter's ballots out of every count, and says why; the ballots stay in the log."""
    caller.needs("write")
    if not (reason := reason.strip()):
        raise BadInput("no reason was given; everybody who sees the votes is told why a voter is left out")
    mine = (voters.c.id == voter_id) & (voters.c.workspace_id == caller.workspace_id)
    async with store.database.writing() as connection:
        done = await connection.execute(update(voters).where(mine).values(excluded_reason=reason[:MAX_REASON]))
        if not done.rowcount:
            raise NotFound(f"Voter `{voter_id[:128]}` not found.")
        await connection.execute(delete(labels).where(labels.c.voter_id == voter_id))


async def _trained(connection: AsyncConnection, caller: Caller, person: Who, about: Sequence[str]) -> set[str]:
    """Of these candidates, those that were trained on a file which this person has stored."""
    if person.kind == "invite" or not about:
        return set()
    theirs = files.c.user_id == caller.user_id if caller.user_id is not None else files.c.key_id == caller.key_id
    query = select(lineage.c.candidate_id).join(files, files.c.id == lineage.c.ref)
    query = query.where(lineage.c.role == "train_data", lineage.c.candidate_id.in_(about), theirs)
    return set(await connection.scalars(query.where(files.c.workspace_id == caller.workspace_id)))
