"""The log of votes: for each comparison a chain, each vote naming the digest of the one before it, its head kept apart.

changed, removed, inserted or reordered votes      found by `verify_votes`
votes cut off at the end                           found by `verify_votes`: the table `chains` knows the head
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, select, update
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
    last, previous = await _head(connection, comparison_id)
    number = last + 1
    row = {**vote, "number": number, "previous": previous}
    row["hash"] = vote_digest(row)
    await connection.execute(insert(votes).values(row))
    moved = {"seq": number, "head": bytes.fromhex(row["hash"])}
    if not last:
        await connection.execute(insert(chains).values(name=_name(comparison_id), **moved))
    else:
        await connection.execute(update(chains).where(_chain(comparison_id)).values(moved))


async def verify_votes(store: Store, caller: Caller, comparison_id: str) -> VoteLog:
    """Recomputes the chain of a comparison's votes from its first to its last."""
    found = await get_comparison(store, caller, comparison_id)
    faults, last, previous = list[str](), 0, FIRST
    async with store.database.reading() as connection:
        head = await _head(connection, found.id)
        while last < head[0]:  # votes that are cast meanwhile come after it
            mine = (votes.c.comparison_id == found.id) & (votes.c.number > last) & (votes.c.number <= head[0])
            rows = (await connection.execute(select(votes).where(mine).order_by(votes.c.number).limit(BATCH))).mappings().all()
            for row in rows:
                if row["number"] != last + 1:
                    faults.append(f"vote {last + 1} is missing")
                elif row["previous"] != previous:
                    faults.append(f"vote {row['number']} does not name the vote before it")
                if vote_digest(dict(row)) != row["hash"]:
                    faults.append(f"vote {row['number']} was changed")
                last, previous = row["number"], row["hash"]
            if not rows:
                break
        count = select(func.count()).select_from(votes).where(votes.c.comparison_id == found.id)
        number = int(await connection.scalar(count.where(votes.c.number <= head[0])) or 0)
        beyond = select(func.max(votes.c.number)).where(votes.c.comparison_id == found.id)
        newest = int(await connection.scalar(beyond) or 0)
        final = await _head(connection, found.id)
    if (last, previous) != head:
        faults.append(f"the log ends with vote {last}, and vote {head[0]} was the last that was written")
    if newest > final[0]:
        faults.append(f"vote {newest} was added beside the log, whose last is vote {final[0]}")
    return VoteLog(number, previous, tuple(faults[:FAULTS]))


async def _head(connection: AsyncConnection, comparison_id: str) -> tuple[int, str]:
    """The number and the digest of the last vote."""
    row = (await connection.execute(select(chains.c.seq, chains.c.head).where(_chain(comparison_id)))).first()
    return (row.seq, bytes(row.head).hex()) if row is not None else (0, FIRST)


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
