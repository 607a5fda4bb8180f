"""Blind votes: a ticket shows two answers and not whose they are; a vote is cast once, and only then are the names told.

A ticket is of one voter and opens once. The server chooses the prompt, the pair and the sides (vote_pairs.py). A voter sees a pair
once, but for a few that come back with their sides swapped, which tell how well the voter agrees with themselves. Answers that name
a candidate are shown to nobody, and neither is the half of the suite that is held back: who trains would otherwise learn it here.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.records import Comparison, get_comparison, missing
from ropewalk.compare.records import visible as visible_comparison
from ropewalk.compare.sealing import unseal
from ropewalk.compare.suite_rows import Message
from ropewalk.compare.suites import prompt as find_prompt
from ropewalk.compare.suites import suite_key
from ropewalk.compare.tables import candidates, comparisons, labels, outputs, vote_tickets, voters, votes
from ropewalk.compare.vote_log import append_vote
from ropewalk.compare.vote_pairs import Pair, choose_pair
from ropewalk.compare.voters import Voter, Who, needs_vote, seeing, voter_of
from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

CHOICES = ("left", "right", "same", "both_bad")
LIFE = 24 * 3600 * 1_000_000  # of a ticket
LONGEST_LOOK = 3600 * 1000  # ms that one vote is said to have taken at most
LABEL = {"left": 0.0, "right": 1.0, "same": 0.5}  # for the right answer; "both bad" prefers neither, and says nothing on judges


@dataclass(frozen=True)
class Ticket:
    """Two answers to one prompt, for one vote."""

    token: str = field(repr=False)
    system: str
    turns: tuple[tuple[str, str], ...]  # (role, text), what was said before the prompt
    prompt: str
    left: str
    right: str
    number: int  # which of the voter's in this comparison, from 1
    expires_at: int


@dataclass(frozen=True)
class Revealed:
    """A vote that was cast, and whose the answers were."""

    choice: str
    comparison_id: str
    prompt_id: str
    left: str  # names
    right: str
    left_candidate: str
    right_candidate: str
    chosen: str | None  # a candidate's id
    number: int


async def next_ticket(store: Store, caller: Caller, comparison_id: str, person: Who) -> Ticket | None:
    """The next pair for a voter; None where no pair is left. Asked again before voting: the same pair under another token."""
    needs_vote(caller)
    if person.comparison_id not in (None, comparison_id):
        raise missing(comparison_id)
    found = await get_comparison(store, seeing(caller), comparison_id)
    about = [item.candidate_id for item in found.items]
    while True:
        async with store.database.writing() as connection:
            voter = await voter_of(connection, store, caller, person, about)
            waiting = await _open_ticket(connection, voter, found)
        pair = None if waiting is not None else await choose_pair(store, caller, found, voter)
        if waiting is None and pair is None:
            return None
        token, moment = secrets.token_urlsafe(32), now()
        async with store.database.writing() as connection:
            await voter_of(connection, store, caller, person, ())  # locked: of two windows, the second finds the first's pair
            pair = await _issue(connection, voter, found, pair, token, moment)
            number = 1 + await _count(connection, voter.id, found.id)
        if pair is not None:
            return await _shown(store, caller, pair, token, number, moment + LIFE)


async def cast(store: Store, caller: Caller, token: str, choice: str, ms: int) -> Revealed:
    """Writes a vote down, for good, and tells the names; a ticket that is used, replaced, too old or another's is none."""
    needs_vote(caller)
    if choice not in CHOICES:
        raise BadInput(f"'{choice[:40]}' is no vote; expected one of {', '.join(CHOICES)}")
    if ms < 0:
        raise BadInput(f"ms is {ms}; expected how many milliseconds the vote took")
    moment = now()
    async with store.database.writing() as connection:
        ticket = await _use(connection, caller, token, moment)
        vote = {
            "id": new_id("vote"),
            "ticket": ticket.token_hash,
            "choice": choice,
            "ms": min(ms, LONGEST_LOOK),
            "created_at": moment,
        }
        kept = ("comparison_id", "voter_id", "prompt_id", "left_candidate", "right_candidate", "is_repeat")
        await append_vote(connection, store, vote | {name: getattr(ticket, name) for name in kept})
        if ticket.is_repeat:
            await _measure_consistency(connection, ticket.voter_id)
        elif choice in LABEL:
            await _label(connection, ticket, choice, moment)
        sides = {"left": ticket.left_candidate, "right": ticket.right_candidate}
        query = select(candidates.c.id, candidates.c.name).where(candidates.c.id.in_(sides.values()))
        names = {row.id: row.name for row in await connection.execute(query)}
        number = await _count(connection, ticket.voter_id, ticket.comparison_id)
    return Revealed(
        choice=choice,
        comparison_id=ticket.comparison_id,
        prompt_id=ticket.prompt_id,
        left=names[ticket.left_candidate],
        right=names[ticket.right_candidate],
        left_candidate=ticket.left_candidate,
        right_candidate=ticket.right_candidate,
        chosen=sides.get(choice),
        number=number,
    )


def said_for(choice: str, left_candidate: str, right_candidate: str, candidate_id: str) -> str:
    """A choice turned to a candidate's side: "new", "old", "same" or "both bad"."""
    if choice not in ("left", "right"):
        return choice.replace("_", " ")
    return "new" if candidate_id == (left_candidate if choice == "left" else right_candidate) else "old"


# -- tickets


async def _open_ticket(connection: AsyncConnection, voter: Voter, found: Comparison) -> Any | None:
    """What the voter was shown and has not voted on."""
    mine = (vote_tickets.c.voter_id == voter.id) & (vote_tickets.c.comparison_id == found.id)
    return (await connection.execute(select(vote_tickets).where(mine, vote_tickets.c.used_at.is_(None)))).first()


async def _issue(
    connection: AsyncConnection, voter: Voter, found: Comparison, pair: Pair | None, token: str, moment: int
) -> Pair | None:
    """Writes the ticket down, or gives the one that waits another token; None where another window was faster."""
    tickets = vote_tickets
    fresh = {"token_hash": _digest(token), "expires_at": moment + LIFE}
    waiting = await _open_ticket(connection, voter, found)
    if waiting is not None:
        same = (tickets.c.token_hash == waiting.token_hash) & tickets.c.used_at.is_(None)
        done = await connection.execute(update(tickets).where(same).values(fresh))
        return Pair(**{name: getattr(waiting, name) for name in Pair.__dataclass_fields__}) if done.rowcount else None
    if pair is None:
        return None
    outputs_of = (tickets.c.left_output == pair.left_output) & (tickets.c.right_output == pair.right_output)
    if not pair.is_repeat:
        outputs_of |= (tickets.c.left_output == pair.right_output) & (tickets.c.right_output == pair.left_output)
    known = select(tickets.c.voter_id).where(tickets.c.voter_id == voter.id, outputs_of)
    if (await connection.execute(known)).first() is not None:
        return None
    row = {"voter_id": voter.id, "comparison_id": found.id, "issued_at": moment, **fresh, **asdict(pair)}
    await connection.execute(insert(tickets).values(row))
    return pair


async def _use(connection: AsyncConnection, caller: Caller, token: str, moment: int) -> Any:
    """The ticket, used from now on."""
    tickets = vote_tickets
    query = select(tickets).join(voters, voters.c.id == tickets.c.voter_id)
    query = query.join(comparisons, comparisons.c.id == tickets.c.comparison_id)
    good = (tickets.c.token_hash == _digest(token)) & tickets.c.used_at.is_(None) & (tickets.c.expires_at > moment)
    query = query.where(good, voters.c.workspace_id == caller.workspace_id, visible_comparison(caller))
    ticket = (await connection.execute(query.with_for_update(of=tickets))).first()
    if ticket is None:
        raise NotFound("This ticket is used or too old, or never was one; ask for the next.")
    await connection.execute(update(tickets).where(tickets.c.token_hash == ticket.token_hash).values(used_at=moment))
    return ticket


async def _shown(store: Store, caller: Caller, pair: Pair, token: str, number: int, expires_at: int) -> Ticket:
    found = await find_prompt(store, seeing(caller), pair.prompt_id)
    key = await suite_key(store, seeing(caller), found.suite_id)
    query = select(outputs.c.id, outputs.c.content).where(outputs.c.id.in_([pair.left_output, pair.right_output]))
    async with store.database.reading() as connection:
        texts = {row.id: unseal(key, row.content, f"output {row.id}") for row in await connection.execute(query)}
    turns = tuple((str(message["role"]), _text(message)) for message in found.messages[:-1])
    left, right = texts[pair.left_output], texts[pair.right_output]
    return Ticket(token, found.system, turns, found.text, left, right, number, expires_at)


async def _count(connection: AsyncConnection, voter_id: str, comparison_id: str) -> int:
    """How often the voter has voted in a comparison."""
    mine = (votes.c.voter_id == voter_id) & (votes.c.comparison_id == comparison_id)
    return int((await connection.scalar(select(func.count()).select_from(votes).where(mine))) or 0)


# -- what a vote is for, beside the count


async def _label(connection: AsyncConnection, ticket: Any, choice: str, moment: int) -> None:
    """What judges are held against; not the opinion of who trained one of the two, nor of who is left out."""
    voter = (await connection.execute(select(voters).where(voters.c.id == ticket.voter_id))).one()
    partial = {ticket.left_candidate, ticket.right_candidate} & set(json.loads(voter.trainer_of))
    if partial or voter.excluded_reason is not None:
        return
    suite = select(outputs.c.suite_id).where(outputs.c.id == ticket.left_output)
    row = {
        "id": new_id("label"),
        "suite_id": (await connection.execute(suite)).scalar_one(),
        "value": LABEL[choice],
        "source": "vote",
        "created_at": moment,
    }
    kept = ("comparison_id", "prompt_id", "left_output", "right_output", "voter_id")
    await connection.execute(insert(labels).values(row | {name: getattr(ticket, name) for name in kept}))


async def _measure_consistency(connection: AsyncConnection, voter_id: str) -> None:
    """How often a voter said the same of a pair that came back."""
    rows = (await connection.execute(select(votes).where(votes.c.voter_id == voter_id).order_by(votes.c.created_at))).all()
    first, again = dict[Any, str](), list[bool]()
    for row in rows:
        one = min(row.left_candidate, row.right_candidate)
        said = said_for(row.choice, row.left_candidate, row.right_candidate, one)
        pair = (row.comparison_id, row.prompt_id, frozenset((row.left_candidate, row.right_candidate)))
        if row.is_repeat:
            again.append(first[pair] == said)
        else:
            first[pair] = said
    await connection.execute(update(voters).where(voters.c.id == voter_id).values(self_consistency=mean(again)))


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
