"""What the votes of a comparison come to: one voter one mean, trainers apart; and what waits for whose vote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from ropewalk.compare.ballots import Ballot, Tally, tally
from ropewalk.compare.records import Comparison, get_comparison, list_comparisons
from ropewalk.compare.tables import voters, votes
from ropewalk.compare.vote_pairs import is_wanted
from ropewalk.compare.voters import Who, identity_hash, known_voter, needs_vote, seeing
from ropewalk.compare.votes import said_for
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

LOOKED_AT = 30  # comparisons, newest first, that may wait for a vote


@dataclass(frozen=True)
class Counted:
    """The votes on one candidate beside the baseline: an opinion, which moves no verdict."""

    tally: Tally
    trainers: Tally  # who trained one of the two: shown apart, and in no other count
    excluded: tuple[tuple[str, str], ...]  # (voter's id, why)


@dataclass(frozen=True)
class Cast:
    """One vote of the log."""

    voter_id: str
    prompt_id: str
    left_candidate: str
    right_candidate: str
    choice: str
    ms: int
    is_repeat: bool
    created_at: int

    def said_for(self, candidate_id: str) -> str:
        """The choice turned to a candidate's side: "new", "old", "same" or "both bad"."""
        return said_for(self.choice, self.left_candidate, self.right_candidate, candidate_id)


async def tally_votes(store: Store, caller: Caller, comparison_id: str) -> dict[str, Counted]:
    """The votes of a comparison, by candidate."""
    found = await get_comparison(store, caller, comparison_id)
    async with store.database.reading() as connection:
        query = select(votes).where(votes.c.comparison_id == found.id).order_by(votes.c.number)
        cast = [_cast(row) for row in await connection.execute(query)]
        known = select(voters).where(voters.c.id.in_(sorted({vote.voter_id for vote in cast})))
        people = {row.id: row for row in await connection.execute(known)}
    return {id: _counted(id, found.baseline_id, cast, people) for id in found.candidate_ids}


async def votes_on(store: Store, caller: Caller, comparison_id: str, prompt_id: str) -> list[Cast]:
    """The votes on one prompt, oldest first."""
    found = await get_comparison(store, caller, comparison_id)
    mine = (votes.c.comparison_id == found.id) & (votes.c.prompt_id == prompt_id)
    async with store.database.reading() as connection:
        return [_cast(row) for row in await connection.execute(select(votes).where(mine).order_by(votes.c.number))]


async def waiting(store: Store, caller: Caller, person: Who, limit: int = 20) -> list[Comparison]:
    """Comparisons that have run and have pairs which this person has not voted on, newest first."""
    needs_vote(caller)
    done = [one for one in await list_comparisons(store, seeing(caller), LOOKED_AT) if one.state == "done"]
    return await not_voted_on(store, caller, identity_hash(store, person), done, limit)


async def not_voted_on(
    store: Store, caller: Caller, identity: bytes, some: Sequence[Comparison], limit: int
) -> list[Comparison]:
    """Of these comparisons, those that wait for the vote of whom this hash stands for."""
    found = list[Comparison]()
    async with store.database.reading() as connection:
        voter = await known_voter(connection, caller, identity)
        for one in some:
            if len(found) < limit and await is_wanted(connection, one, voter.id if voter else None):
                found.append(one)
    return found


def _counted(candidate_id: str, baseline_id: str, cast: Sequence[Cast], people: dict[str, Any]) -> Counted:
    pair = {candidate_id, baseline_id}
    ours = [vote for vote in cast if {vote.left_candidate, vote.right_candidate} == pair]
    out = {vote.voter_id for vote in ours if people[vote.voter_id].excluded_reason is not None}
    trainers = {vote.voter_id for vote in ours if pair & set(json.loads(people[vote.voter_id].trainer_of))} - out

    def ballots(some: Sequence[Cast]) -> list[Ballot]:
        return [Ballot(vote.voter_id, vote.prompt_id, vote.said_for(candidate_id), vote.is_repeat) for vote in some]

    return Counted(
        tally(ballots([vote for vote in ours if vote.voter_id not in out | trainers])),
        tally(ballots([vote for vote in ours if vote.voter_id in trainers])),
        tuple((id, people[id].excluded_reason) for id in sorted(out)),
    )


def _cast(row: Any) -> Cast:
    return Cast(**{name: getattr(row, name) for name in Cast.__dataclass_fields__})
