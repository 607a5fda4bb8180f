"""Candidates: what can be compared. A base, an adapter, an alias or a remote model as it is served now, or a card, of which only words are known."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from sqlalchemy import ColumnElement, delete, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.cards import Card, CardWarning, same_tool
from ropewalk.compare.cards import restored as restored_card
from ropewalk.compare.cards import stored as stored_card
from ropewalk.compare.claims import Claim, ClaimStatus
from ropewalk.compare.claims import status as status_of
from ropewalk.compare.contradictions import conflicts
from ropewalk.compare.page_text import read_page
from ropewalk.compare.provenance import Lineage, served
from ropewalk.compare.tables import candidates, cards, claims, measurements
from ropewalk.compare.tables import lineage as lineages
from ropewalk.database import now
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, NotFound
from ropewalk.files.catalog import ID
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

Kind: TypeAlias = Literal["base", "adapter", "alias", "remote", "card"]
PAGE = 1000


@dataclass(frozen=True)
class Candidate:
    """One of those that are compared, as it was when it was added."""

    id: str
    workspace_id: str
    user_id: str | None
    kind: Kind
    name: str
    target: str  # the name it is served by; "" for a card
    digest: str  # of the weights; of a card's text for a card
    family: str
    template_digest: str
    lineage: Lineage = field(default_factory=Lineage)
    card: Card | None = None
    linked_to: str | None = None  # of a card: the candidate that can be run
    created_at: int = 0

    @property
    def runs(self) -> bool:
        """Whether it can be asked."""
        return self.kind != "card"


@dataclass(frozen=True)
class StoredClaim:
    """A number that a card states, and what was measured."""

    id: str
    candidate_id: str
    number: int  # its place on the card, from 1
    claim: Claim
    status: ClaimStatus
    measurement_id: str | None
    low: float | None
    high: float | None
    tested_at: int | None


# -- what is served


async def add_candidate(store: Store, models: Models, caller: Caller, name: str) -> Candidate:
    """The model that is served by this name, as it is now; the same model once more is the candidate that there is."""
    caller.needs("write")
    found = await served(store, models, caller, name)
    now_there = {"kind": found.kind, "name": name, "digest": found.digest, "template_digest": found.template_digest}
    same = [candidates.c[column] == value for column, value in now_there.items()]
    async with store.database.writing() as connection:
        known = select(candidates.c.id).where(visible(caller), *same).order_by(candidates.c.created_at).limit(1)
        id: str | None = (await connection.execute(known)).scalar()
        if id is None:
            id = await _insert(connection, caller, **now_there, target=name, family=found.family)
        await _write_lineage(connection, id, found.lineage)  # which may be known better by now
    return await get_candidate(store, caller, id)


async def twin(store: Store, caller: Caller, id: str) -> Candidate:
    """A candidate once more, to be held against itself."""
    caller.needs("write")
    one = await get_candidate(store, caller, id)
    if not one.runs:
        raise BadInput(f"'{one.name}' is a card, which says of itself only what it says; name a model that is served")
    async with store.database.writing() as connection:
        values = {"kind": one.kind, "name": f"{one.name} (again)", "target": one.target, "digest": one.digest}
        other = await _insert(connection, caller, **values, family=one.family, template_digest=one.template_digest)
        await _write_lineage(connection, other, one.lineage)
    return await get_candidate(store, caller, other)


async def current_digest(store: Store, models: Models, caller: Caller, name: str) -> str:
    """Of what is served by this name now."""
    return (await served(store, models, caller, name)).digest


# -- cards


async def add_cards(
    store: Store, caller: Caller, page_text: str | bytes, source_url: str | None = None, source_date: str | None = None
) -> list[Candidate]:
    """Reads a review page's text into cards; what they and earlier cards of the same tools say differently becomes warnings."""
    caller.needs("write")
    page = await asyncio.to_thread(read_page, page_text, source_url=source_url, source_date=source_date)
    text = page_text.encode("utf-8", "surrogatepass") if isinstance(page_text, str) else page_text
    digest = hashlib.sha256(text).hexdigest()
    ids = []
    async with store.database.writing() as connection:
        earlier = await _cards(connection, caller)
        for card in page.cards:
            same = {id: other for id, other in earlier.items() if same_tool(card, other)}
            if known := next((id for id, other in same.items() if _facts(other) == _facts(card)), None):
                ids.append(known)
                continue
            notes = {id: conflicts([other, card]) for id, other in same.items()}
            for id, found in notes.items():
                if found:
                    earlier[id] = _warned(earlier[id], found)
                    content = json.dumps(_content(earlier[id]))
                    await connection.execute(update(cards).where(cards.c.candidate_id == id).values(content=content))
            card = _warned(card, [note for found in notes.values() for note in found])
            values = {"kind": "card", "name": card.name, "target": "", "digest": digest, "family": "", "template_digest": ""}
            id = await _insert(connection, caller, **values)
            row = {"candidate_id": id, "content": json.dumps(_content(card)), "text_digest": digest, "imported_at": now()}
            await connection.execute(insert(cards).values(row))
            if card.claims:
                await connection.execute(insert(claims), _claim_rows(id, card.claims))
            earlier[id] = card
            ids.append(id)
    return [await get_candidate(store, caller, id) for id in ids]


async def link(store: Store, caller: Caller, card_id: str, candidate_id: str) -> Candidate:
    """Says which candidate that can be run a card is about, so that its claims can be tested."""
    caller.needs("write")
    card, other = await get_candidate(store, caller, card_id), await get_candidate(store, caller, candidate_id)
    if card.runs:
        raise BadInput(f"'{card.name}' is no card but {_article(card.kind)}; link a card to it")
    if not other.runs:
        raise BadInput(
            f"'{other.name}' is a card too; link to something that is served, which `ropewalk compare add NAME` adds"
        )
    async with store.database.writing() as connection:
        if card.linked_to not in (None, other.id):  # what was measured was of another
            await connection.execute(update(claims).where(claims.c.candidate_id == card.id).values(UNTESTED))
        await connection.execute(update(candidates).where(candidates.c.id == card.id).values(linked_to=other.id))
    return replace(card, linked_to=other.id)


async def card_claims(store: Store, caller: Caller, candidate_id: str) -> list[StoredClaim]:
    """The claims of a card, in its order."""
    card = await get_candidate(store, caller, candidate_id)
    async with store.database.reading() as connection:
        query = select(claims).where(claims.c.candidate_id == card.id).order_by(claims.c.number)
        return [_claim(row) for row in await connection.execute(query)]


async def measure_claim(
    store: Store, caller: Caller, claim_id: str, measurement_id: str, low: float | None, high: float | None
) -> StoredClaim:
    """Holds a claim against a measured interval, in the claim's unit."""
    caller.needs("write")
    async with store.database.writing() as connection:
        query = select(claims, candidates.c.linked_to).join(candidates, candidates.c.id == claims.c.candidate_id)
        row = None
        if ID.fullmatch(claim_id):
            row = (await connection.execute(query.where(claims.c.id == claim_id, visible(caller)))).first()
        if row is None:
            raise NotFound(f"Claim `{claim_id[:128]}` not found.")
        mine = (measurements.c.id == measurement_id) & (measurements.c.candidate_id == row.linked_to)
        if (await connection.execute(select(measurements.c.id).where(mine))).first() is None:
            raise BadInput(
                f"'{measurement_id[:128]}' is no measurement of what the card is linked to; link the card, and measure that"
            )
        tested = {
            "status": str(status_of(_claim(row).claim, low, high)),
            "measurement_id": measurement_id,
            "low": low,
            "high": high,
            "tested_at": now(),
        }
        await connection.execute(update(claims).where(claims.c.id == claim_id).values(tested))
        return _claim((await connection.execute(select(claims).where(claims.c.id == claim_id))).one())


# -- all of them


async def get_candidate(store: Store, caller: Caller, id: str) -> Candidate:
    """One candidate; NotFound also for another's."""
    caller.needs("read")
    async with store.database.reading() as connection:
        return await _find(connection, caller, id)


async def list_candidates(store: Store, caller: Caller, limit: int = 100, after: str | None = None) -> list[Candidate]:
    """Up to `limit` candidates, newest first, after one of them."""
    caller.needs("read")
    query = select(candidates).where(visible(caller))
    async with store.database.reading() as connection:
        if after is not None:
            last = await _find(connection, caller, after)
            query = query.where(tuple_(candidates.c.created_at, candidates.c.id) < (last.created_at, last.id))
        order = candidates.c.created_at.desc(), candidates.c.id.desc()
        rows = (await connection.execute(query.order_by(*order).limit(min(limit, PAGE)))).all()
        return await _all(connection, rows)


def visible(caller: Caller) -> ColumnElement[bool]:
    """Candidates of the caller's workspace, and of its user if it stands for one."""
    mine = candidates.c.workspace_id == caller.workspace_id
    return mine if caller.user_id is None else mine & (candidates.c.user_id == caller.user_id)


def missing(id: str) -> NotFound:
    """The same for an id that never was and that is another's."""
    return NotFound(f"Candidate `{id[:128]}` not found.")


async def _find(connection: AsyncConnection, caller: Caller, id: str) -> Candidate:
    rows: Sequence[Any] = ()
    if ID.fullmatch(id):
        rows = (await connection.execute(select(candidates).where(candidates.c.id == id, visible(caller)))).all()
    if not rows:
        raise missing(id)
    return (await _all(connection, rows))[0]


async def _all(connection: AsyncConnection, rows: Sequence[Any]) -> list[Candidate]:
    """Rows with their lineage, cards and claims."""
    ids = [row.id for row in rows]
    origins: dict[str, list[tuple[str, str, float | None]]] = {id: [] for id in ids}
    stated: dict[str, list[dict[str, Any]]] = {id: [] for id in ids}
    query = select(lineages).where(lineages.c.candidate_id.in_(ids)).order_by(lineages.c.role, lineages.c.ref)
    for row in await connection.execute(query):
        origins[row.candidate_id].append((row.role, row.ref, row.share))
    for row in await connection.execute(select(claims).where(claims.c.candidate_id.in_(ids)).order_by(claims.c.number)):
        stated[row.candidate_id].append(json.loads(row.content))
    texts = {
        row.candidate_id: row.content for row in await connection.execute(select(cards).where(cards.c.candidate_id.in_(ids)))
    }
    found = []
    for row in rows:
        card = restored_card({**json.loads(texts[row.id]), "claims": stated[row.id]}) if row.id in texts else None
        found.append(Candidate(**row._mapping, lineage=Lineage.of(origins[row.id]), card=card))
    return found


async def _insert(connection: AsyncConnection, caller: Caller, **values: str) -> str:
    owner = {"workspace_id": caller.workspace_id, "user_id": caller.user_id}
    id = new_id("cand")
    await connection.execute(insert(candidates).values(id=id, **owner, **values, created_at=now()))
    return id


async def _write_lineage(connection: AsyncConnection, id: str, found: Lineage) -> None:
    await connection.execute(delete(lineages).where(lineages.c.candidate_id == id))
    rows = [{"candidate_id": id, "role": role, "ref": ref, "share": share} for role, ref, share in found.rows()]
    if rows:
        await connection.execute(insert(lineages), rows)


async def _cards(connection: AsyncConnection, caller: Caller) -> dict[str, Card]:
    """Every card that the caller sees, oldest first."""
    query = select(candidates).where(visible(caller), candidates.c.kind == "card")
    rows = (await connection.execute(query.order_by(candidates.c.created_at, candidates.c.id))).all()
    return {one.id: one.card for one in await _all(connection, rows) if one.card is not None}


def _content(card: Card) -> dict[str, Any]:
    return {key: value for key, value in stored_card(card).items() if key != "claims"}


def _facts(card: Card) -> dict[str, Any]:
    """What the page says, whatever page it was and whatever was noted about it."""
    return stored_card(replace(card, source_url=None, source_date=None, warnings=()))


def _warned(card: Card, notes: Sequence[CardWarning]) -> Card:
    return replace(card, warnings=tuple(dict.fromkeys((*card.warnings, *notes))))


UNTESTED: Mapping[str, Any] = {
    "status": str(ClaimStatus.UNTESTED),
    "measurement_id": None,
    "low": None,
    "high": None,
    "tested_at": None,
}


def _claim_rows(candidate_id: str, stated: Sequence[Claim]) -> list[dict[str, Any]]:
    return [
        {
            "id": new_id("claim"),
            "candidate_id": candidate_id,
            "number": number,
            "content": json.dumps(asdict(one)),
            "metric": one.metric,
            **UNTESTED,
        }
        for number, one in enumerate(stated, 1)
    ]


def _claim(row: Any) -> StoredClaim:
    own = {name: getattr(row, name) for name in ("id", "candidate_id", "number", "measurement_id", "low", "high", "tested_at")}
    return StoredClaim(**own, claim=Claim(**json.loads(row.content)), status=ClaimStatus(row.status))


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
