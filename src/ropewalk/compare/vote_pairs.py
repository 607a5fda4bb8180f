"""Which two answers a voter is shown next, and on which side: chosen by the server, at random."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.candidates import get_candidate
from ropewalk.compare.identity_words import IdentityWords
from ropewalk.compare.records import Comparison, Item
from ropewalk.compare.sealing import unseal
from ropewalk.compare.suites import suite_key
from ropewalk.compare.tables import outputs, prompts, vote_tickets
from ropewalk.compare.voters import Voter, seeing
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

REPEATS = 0.05  # of tickets show a pair once more, its sides swapped
AFTER = 3  # votes between a pair and the same again
PORTION = 40  # pairs looked at in one step
CHANCE = secrets.SystemRandom()
OLD, NEW = outputs.alias("old"), outputs.alias("new")


@dataclass(frozen=True)
class Pair:
    """Two outputs to be shown, and who gave them."""

    prompt_id: str
    left_output: str
    right_output: str
    left_candidate: str
    right_candidate: str
    is_repeat: bool = False

    def swapped(self) -> Pair:
        """The same once more, the other way round."""
        return Pair(
            self.prompt_id, self.right_output, self.left_output, self.right_candidate, self.left_candidate, is_repeat=True
        )


async def choose_pair(store: Store, caller: Caller, comparison: Comparison, voter: Voter) -> Pair | None:
    """A pair that the voter has not seen, of the baseline's answer and a candidate's; now and then one seen before."""
    if CHANCE.random() < REPEATS and (seen := await _seen(store, comparison, voter)):
        return CHANCE.choice(seen).swapped()
    baseline, *others = comparison.items
    for other in CHANCE.sample(others, len(others)):
        if (pair := await _unseen(store, caller, comparison, voter, baseline, other)) is not None:
            return pair
    return None


async def is_wanted(connection: AsyncConnection, comparison: Comparison, voter_id: str | None) -> bool:
    """Whether there is a pair that the voter has not voted on; one that names a candidate counts here too."""
    baseline, *others = comparison.items
    for other in others:
        query = _pairs(baseline, other, voter_id, only_used=True)
        if query is not None and (await connection.execute(query.limit(1))).first() is not None:
            return True
    return False


async def _unseen(
    store: Store, caller: Caller, comparison: Comparison, voter: Voter, baseline: Item, other: Item
) -> Pair | None:
    """Walks round the prompts from a random one on, whose ids are random, to the first pair that may be shown."""
    query = _pairs(baseline, other, voter.id)
    if query is None:
        return None
    key, words = b"", None
    start = new_id("prompt")
    for lowest, highest in ((start, None), ("", start)):
        last, inclusive = lowest, True
        while True:
            place = OLD.c.prompt_id  # the key of outputs has them in this order
            some = query.where(place >= last if inclusive else place > last)
            if highest is not None:
                some = some.where(place < highest)
            async with store.database.reading() as connection:
                rows = (await connection.execute(some.order_by(place).limit(PORTION))).all()
            if not rows:
                break
            if words is None:
                key = await suite_key(store, seeing(caller), rows[0].suite_id)
                words = await _identity_words(store, caller, comparison)
            blind = await asyncio.to_thread(_first_blind, key, words, rows)
            if blind is not None:
                pair = Pair(blind.id, blind.old_id, blind.new_id, baseline.candidate_id, other.candidate_id)
                if CHANCE.getrandbits(1):
                    return pair
                return Pair(pair.prompt_id, pair.right_output, pair.left_output, pair.right_candidate, pair.left_candidate)
            last, inclusive = rows[-1].id, False
    return None


def _first_blind(key: bytes, words: IdentityWords, rows: Sequence[Any]) -> Any | None:
    """The first row whose answers differ and tell nothing of who gave them."""
    for row in rows:
        old = unseal(key, row.old_content, f"output {row.old_id}")
        new = unseal(key, row.new_content, f"output {row.new_id}")
        if old.strip() != new.strip() and not words.in_(old) and not words.in_(new):
            return row
    return None


def _pairs(baseline: Item, other: Item, voter_id: str | None, only_used: bool = False) -> Select[Any] | None:
    """First samples of both runs on prompts that are not held back, that differ and that this voter has no ticket for."""
    if baseline.run_id is None or other.run_id is None:
        return None
    old, new, tickets = OLD, NEW, vote_tickets
    query = (
        select(
            prompts.c.id,
            prompts.c.suite_id,
            old.c.id.label("old_id"),
            old.c.content.label("old_content"),
            new.c.id.label("new_id"),
            new.c.content.label("new_content"),
        )
        .join(old, old.c.prompt_id == prompts.c.id)
        .join(new, new.c.prompt_id == prompts.c.id)
        .where(old.c.run_id == baseline.run_id, old.c.sample == 0, old.c.error.is_(None), old.c.content.is_not(None))
        .where(new.c.run_id == other.run_id, new.c.sample == 0, new.c.error.is_(None), new.c.content.is_not(None))
        .where(~prompts.c.held, old.c.text_hash != new.c.text_hash)
    )
    if voter_id is None:
        return query
    either_way = ((tickets.c.left_output == old.c.id) & (tickets.c.right_output == new.c.id)) | (
        (tickets.c.left_output == new.c.id) & (tickets.c.right_output == old.c.id)
    )
    had = select(tickets.c.voter_id).where(tickets.c.voter_id == voter_id, either_way)
    if only_used:
        had = had.where(tickets.c.used_at.is_not(None))
    return query.where(~had.exists())


async def _seen(store: Store, comparison: Comparison, voter: Voter) -> list[Pair]:
    """Pairs that the voter has voted on once, but for the last few."""
    tickets = vote_tickets
    mine = (tickets.c.voter_id == voter.id) & (tickets.c.comparison_id == comparison.id) & tickets.c.used_at.is_not(None)
    async with store.database.reading() as connection:
        rows = (await connection.execute(select(tickets).where(mine).order_by(tickets.c.used_at))).all()
    again = {(row.right_output, row.left_output) for row in rows if row.is_repeat}
    first = [row for row in rows[: max(0, len(rows) - AFTER)] if not row.is_repeat]
    return [
        Pair(row.prompt_id, row.left_output, row.right_output, row.left_candidate, row.right_candidate)
        for row in first
        if (row.left_output, row.right_output) not in again
    ]


async def _identity_words(store: Store, caller: Caller, comparison: Comparison) -> IdentityWords:
    found = [await get_candidate(store, seeing(caller), item.candidate_id) for item in comparison.items]
    names = [name for one in found for name in (one.name, one.target)]
    return IdentityWords(names, [one.family for one in found])
