"""The log of votes: for each comparison a chain, each vote naming the digest of the one before it, its head kept apart.

changed, removed, inserted or reordered votes      found by `verify_votes`
votes cut off at the end                           found by `verify_votes`: the table `chains` knows the head
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.records import get_comparison
from ropewalk.compare.tables import comparisons, votes
from ropewalk.errors import VerificationFailed
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.signing import canonical
from ropewalk.tenants.tables import chains

FIRST = "0" * 64  # the digest before the first vote's
BATCH = 1000
FAULTS = 20  # of a log that is broken everywhere, only so many are told


@dataclass(frozen=True)
class VoteLog:
    """What `verify_votes` found."""

    votes: int
    head: str
    faults: tuple[str, ...]

    def check(self) -> None:
        """Raises VerificationFailed for a log that is not what was written."""
        if self.faults:
            raise VerificationFailed(f"the log of votes is not what was written: {'; '.join(self.faults)}")


async def append_vote(connection: AsyncConnection, store: Store, vote: Mapping[str, Any]) -> None:
    """Adds a vote to its comparison's chain; the chain is locked from here to the commit."""
    comparison_id = vote["comparison_id"]
    # The comparison's row is locked first, so that of two first votes one makes the head and the other finds it.
    await connection.execute(select(comparisons.c.id).where(comparisons.c.id == comparison_id).with_for_update())
    head = (await connection.execute(select(chains.c.seq, chains.c.head).where(_chain(comparison_id)))).first()
    number, previous = (head.seq + 1, bytes(head.head).hex()) if head is not None else (1, FIRST)
    row = {**vote, "number": number, "previous": previous}
    row["hash"] = vote_digest(row)
    await connection.execute(insert(votes).values(row))
    moved = {"seq": number, "head": bytes.fromhex(row["hash"])}
    if head is None:
        await connection.execute(insert(chains).values(name=_name(comparison_id), **moved))
    else:
        await connection.execute(update(chains).where(_chain(comparison_id)).values(moved))


async def verify_votes(store: Store, caller: Caller, comparison_id: str) -> VoteLog:
    """Recomputes the chain of a comparison's votes from its first to its last."""
    found = await get_comparison(store, caller, comparison_id)
    faults, last, previous, count = list[str](), 0, FIRST, 0
    async with store.database.reading() as connection:
        while True:
            mine = (votes.c.comparison_id == found.id) & (votes.c.number > last)
            rows = (await connection.execute(select(votes).where(mine).order_by(votes.c.number).limit(BATCH))).mappings().all()
            for row in rows:
                if row["number"] != last + 1:
                    faults.append(f"vote {last + 1} is missing")
                elif row["previous"] != previous:
                    faults.append(f"vote {row['number']} does not name the vote before it")
                if vote_digest(dict(row)) != row["hash"]:
                    faults.append(f"vote {row['number']} was changed")
                last, previous, count = row["number"], row["hash"], count + 1
            if len(rows) < BATCH:
                break
        head = (await connection.execute(select(chains.c.seq, chains.c.head).where(_chain(found.id)))).first()
    expected = (head.seq, bytes(head.head).hex()) if head is not None else (0, FIRST)
    if (last, previous) != expected:
        faults.append(f"the log ends with vote {last}, and vote {expected[0]} was the last that was written")
    return VoteLog(count, previous, tuple(faults[:FAULTS]))


def vote_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a vote says; the digest of the one before it is part of that."""
    told = {name: _plain(row[name]) for name in SAID}
    return hashlib.sha256(canonical(told).encode()).hexdigest()


SAID = tuple(column.name for column in votes.c if column.name != "hash")


def _plain(value: Any) -> Any:
    return bytes(value).hex() if isinstance(value, (bytes, memoryview)) else value


def _name(comparison_id: str) -> str:
    return f"votes {comparison_id}"


def _chain(comparison_id: str) -> Any:
    return chains.c.name == _name(comparison_id)
