"""Comparisons and their verdicts: what was to be compared, how far it is, and what the rule said, which is never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare import candidates as known
from ropewalk.compare.evidence import Limits
from ropewalk.compare.rule import RULE_VERSION
from ropewalk.compare.state import State
from ropewalk.compare.suites import get_suite, one_line
from ropewalk.compare.tables import candidates, comparison_items, comparisons, verdicts
from ropewalk.compare.verdict import Interval, Reason, Slice, Verdict
from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound
from ropewalk.files.catalog import ID
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import workspaces

Progress = Literal["new", "running", "done", "failed"]
MOST = 32  # candidates of one comparison
PAGE = 1000


@dataclass(frozen=True)
class Plan:
    """What was decided before anything ran."""

    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    judges: tuple[str, ...] = ()  # candidates
    stop_early: bool = False
    budget: float | None = None  # in US dollars
    limits: Limits = field(default_factory=Limits)
    samples: int = 1
    seed: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `parse` reads it back."""
        return asdict(self)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Plan:
        parts = {"judges": tuple(values.get("judges", ())), "limits": Limits(**values.get("limits", {}))}
        return cls(**{**values, **parts})


@dataclass(frozen=True)
class Item:
    """One candidate of a comparison; number 0 is what the others are held against."""

    candidate_id: str
    number: int
    run_id: str | None
    chosen_from: int  # checkpoints that were tried, of which this is one


@dataclass(frozen=True)
class Comparison:
    """One question: which of these should be shipped? Times are microseconds."""

    id: str
    workspace_id: str
    user_id: str | None
    title: str
    category: str
    suite_id: str | None  # None: cards alone; a suite that is gone is still named
    baseline_id: str
    items: tuple[Item, ...]
    rule_version: str
    plan: Plan
    state: Progress
    error: str | None
    created_at: int
    started_at: int | None
    finished_at: int | None

    @property
    def candidate_ids(self) -> tuple[str, ...]:
        """Without the baseline."""
        return tuple(item.candidate_id for item in self.items if item.number)

    def item(self, candidate_id: str) -> Item:
        """The place of a candidate in it."""
        return next(item for item in self.items if item.candidate_id == candidate_id)


@dataclass(frozen=True)
class StoredVerdict:
    """A verdict as it was given."""

    id: str
    comparison_id: str
    candidate_id: str
    edition: int  # each time a comparison is decided, its verdicts are one edition
    verdict: Verdict
    inputs_digest: str
    created_at: int


OWN = [column for column in comparisons.c if column.name in {field.name for field in fields(Comparison)}]


async def create(
    store: Store,
    caller: Caller,
    *,
    baseline_id: str,
    candidate_ids: Sequence[str],
    suite_id: str | None = None,
    title: str = "",
    category: str = "",
    plan: Plan | None = None,
    chosen_from: Mapping[str, int] | None = None,
) -> Comparison:
    """A comparison that is yet to run; `chosen_from` says of a candidate out of how many checkpoints it was taken."""
    caller.needs("write")
    plan, chosen_from = plan or Plan(), chosen_from or {}
    if not 1 <= len(candidate_ids) <= MOST:
        raise BadInput(f"{len(candidate_ids)} candidates; expected 1 to {MOST} beside the baseline")
    if len(set(candidate_ids)) < len(candidate_ids):
        raise BadInput("a candidate is named twice; name each once")
    if wrong := [id for id, count in chosen_from.items() if id not in candidate_ids or count < 1]:
        raise BadInput(f"chosen_from: '{wrong[0]}' is no candidate of this comparison, or its count is below 1")
    found = [await known.get_candidate(store, caller, id) for id in (baseline_id, *candidate_ids)]
    if suite_id is None and all(candidate.runs for candidate in found):
        raise BadInput("nothing says on what to compare: name a suite, `ropewalk compare suite FILE` makes one")
    if suite_id is not None:
        await get_suite(store, caller, suite_id)
        if not (found[0].runs or found[0].linked_to):
            raise BadInput(
                f"the baseline '{found[0].name}' is a card, which cannot be run; link it to a candidate, or name another"
            )
    for judge in plan.judges:
        if not (await known.get_candidate(store, caller, judge)).runs:
            raise BadInput(f"the judge '{judge}' is a card, which cannot be asked; name a model that is served")
    # One that is held against itself is there twice, so that its answers are too.
    found = [
        await known.twin(store, caller, one.id) if number and one.id == baseline_id else one for number, one in enumerate(found)
    ]
    tried = {one.id: chosen_from.get(id, 1) for one, id in zip(found[1:], candidate_ids)}
    title = one_line(title) or " vs ".join(candidate.name for candidate in found)
    moment, id = now(), new_id("cmp")
    row = {
        "id": id,
        "workspace_id": caller.workspace_id,
        "user_id": caller.user_id,
        "title": one_line(title),
        "category": one_line(category),
        "suite_id": suite_id,
        "baseline_id": baseline_id,
        "rule_version": RULE_VERSION,
        "plan": json.dumps(plan.as_dict()),
        "state": "new",
        "lease_until": 0,
        "created_at": moment,
    }
    items = [
        {"comparison_id": id, "number": number, "candidate_id": one.id, "chosen_from": tried.get(one.id, 1)}
        for number, one in enumerate(found)
    ]
    async with store.database.writing() as connection:
        await connection.execute(insert(comparisons).values(row))
        await connection.execute(insert(comparison_items), items)
    return await get_comparison(store, caller, id)


async def get_comparison(store: Store, caller: Caller, id: str) -> Comparison:
    """One comparison; NotFound also for another's."""
    caller.needs("read")
    async with store.database.reading() as connection:
        return await _find(connection, caller, id)


async def list_comparisons(store: Store, caller: Caller, limit: int = 100, after: str | None = None) -> list[Comparison]:
    """Up to `limit` comparisons, newest first, after one of them."""
    caller.needs("read")
    query = select(*OWN).where(visible(caller))
    async with store.database.reading() as connection:
        if after is not None:
            last = await _find(connection, caller, after)
            query = query.where(tuple_(comparisons.c.created_at, comparisons.c.id) < (last.created_at, last.id))
        rows = await connection.execute(
            query.order_by(comparisons.c.created_at.desc(), comparisons.c.id.desc()).limit(min(limit, PAGE))
        )
        return await _all(connection, rows.all())


async def of_candidate(store: Store, caller: Caller, candidate_id: str) -> list[Comparison]:
    """Every comparison that a candidate takes part in, newest first."""
    await known.get_candidate(store, caller, candidate_id)
    mine = select(comparison_items.c.comparison_id).where(comparison_items.c.candidate_id == candidate_id)
    query = select(*OWN).where(visible(caller), comparisons.c.id.in_(mine))
    async with store.database.reading() as connection:
        rows = await connection.execute(query.order_by(comparisons.c.created_at.desc(), comparisons.c.id.desc()))
        return await _all(connection, rows.all())


async def set_state(store: Store, caller: Caller, id: str, state: Progress, error: str | None = None) -> Comparison:
    """How far a comparison is; one that ends is held by nobody any more."""
    caller.needs("write")
    assert state in get_args(Progress), state
    moment = now()
    values: dict[str, Any] = {"state": state, "error": error}
    if state == "running":
        values |= {"started_at": func.coalesce(comparisons.c.started_at, moment), "finished_at": None}
    elif state != "new":
        values |= {"finished_at": moment, "holder": None, "lease_until": 0}
    async with store.database.writing() as connection:
        await _find(connection, caller, id)
        await connection.execute(update(comparisons).where(comparisons.c.id == id).values(values))
        return await _find(connection, caller, id)


async def set_run(store: Store, caller: Caller, id: str, candidate_id: str, run_id: str) -> None:
    """The run that a candidate's answers of this comparison are of."""
    caller.needs("write")
    mine = (comparison_items.c.comparison_id == id) & (comparison_items.c.candidate_id == candidate_id)
    async with store.database.writing() as connection:
        await _find(connection, caller, id)
        await connection.execute(update(comparison_items).where(mine).values(run_id=run_id))


# -- who works on it


async def claim(store: Store, id: str, holder: str, seconds: float) -> bool:
    """Takes a comparison for a process, or keeps it; False where another holds it and is believed alive."""
    moment = now()
    free = (comparisons.c.lease_until <= moment) | (comparisons.c.holder == holder)
    taken = update(comparisons).where(comparisons.c.id == id, free)
    async with store.database.writing() as connection:
        done = await connection.execute(taken.values(holder=holder, lease_until=moment + round(seconds * 1_000_000)))
        return bool(done.rowcount)


async def release(store: Store, id: str, holder: str) -> None:
    """Gives it back."""
    mine = (comparisons.c.id == id) & (comparisons.c.holder == holder)
    async with store.database.writing() as connection:
        await connection.execute(update(comparisons).where(mine).values(holder=None, lease_until=0))


async def unfinished(store: Store) -> list[tuple[Caller, str]]:
    """Comparisons that began to run and that nobody works on, with whose they are: a process ended, and another goes on."""
    left = (comparisons.c.state == "running") & (comparisons.c.lease_until <= now())
    alive = workspaces.c.archived_at.is_(None) & workspaces.c.sealed_key.is_not(None)
    query = select(
        comparisons.c.id, comparisons.c.workspace_id, comparisons.c.user_id, workspaces.c.organization_id.label("organization")
    ).join(workspaces, workspaces.c.id == comparisons.c.workspace_id)
    async with store.database.reading() as connection:
        rows = (await connection.execute(query.where(left, alive).order_by(comparisons.c.created_at))).all()
    return [(Caller(row.organization, row.workspace_id, None, row.user_id), row.id) for row in rows]


# -- verdicts


async def save_verdicts(
    store: Store, caller: Caller, comparison_id: str, given: Sequence[Verdict], inputs: bytes | str
) -> list[StoredVerdict]:
    """Writes down what the rule said, as the next edition, with the digest of the evidence it said it from."""
    caller.needs("write")
    digest = hashlib.sha256(inputs.encode() if isinstance(inputs, str) else inputs).hexdigest()
    moment, stored = now(), list[StoredVerdict]()
    async with store.database.writing() as connection:
        found = await _find(connection, caller, comparison_id)
        # The comparison's row is locked, so that of two editions one is the next of the other.
        await connection.execute(select(comparisons.c.id).where(comparisons.c.id == comparison_id).with_for_update())
        assert {one.candidate for one in given} <= set(found.candidate_ids)
        last = select(func.max(verdicts.c.edition)).where(verdicts.c.comparison_id == comparison_id)
        edition = ((await connection.execute(last)).scalar() or 0) + 1
        for one in given:
            stored.append(StoredVerdict(new_id("verdict"), comparison_id, one.candidate, edition, one, digest, moment))
        rows = [
            {
                "id": one.id,
                "comparison_id": comparison_id,
                "candidate_id": one.candidate_id,
                "edition": edition,
                "state": str(one.verdict.state),
                "effect": one.verdict.effect,
                "low": one.verdict.low,
                "high": one.verdict.high,
                "content": json.dumps(one.verdict.as_dict()),
                "inputs_digest": digest,
                "rule_version": one.verdict.rule_version,
                "created_at": moment,
            }
            for one in stored
        ]
        if rows:
            await connection.execute(insert(verdicts), rows)
    return stored


async def latest(store: Store, caller: Caller, comparison_id: str) -> list[StoredVerdict]:
    """The last edition of a comparison's verdicts, its candidates in order; nothing before it was decided."""
    found = await editions(store, caller, comparison_id)
    return [one for one in found if one.edition == found[-1].edition]


async def editions(store: Store, caller: Caller, comparison_id: str) -> list[StoredVerdict]:
    """Every verdict of a comparison, oldest first."""
    caller.needs("read")
    async with store.database.reading() as connection:
        found = await _find(connection, caller, comparison_id)
        rows = (await connection.execute(select(verdicts).where(verdicts.c.comparison_id == comparison_id))).all()
    place = {id: number for number, id in enumerate(found.candidate_ids)}
    return sorted((_stored(row) for row in rows), key=lambda one: (one.edition, place[one.candidate_id]))


async def verdicts_of(store: Store, caller: Caller, candidate_id: str) -> list[StoredVerdict]:
    """Every verdict about a candidate, newest first."""
    await known.get_candidate(store, caller, candidate_id)
    query = select(verdicts).join(comparisons, comparisons.c.id == verdicts.c.comparison_id)
    query = query.where(verdicts.c.candidate_id == candidate_id, visible(caller))
    async with store.database.reading() as connection:
        rows = (await connection.execute(query.order_by(verdicts.c.created_at.desc(), verdicts.c.id))).all()
    return [_stored(row) for row in rows]


async def verdicts_about(store: Store, caller: Caller, targets: Collection[str]) -> list[StoredVerdict]:
    """What comparisons said last about whatever is served by these names, the newest comparison first."""
    caller.needs("read")
    every = verdicts.alias()
    last = select(func.max(every.c.edition)).where(every.c.comparison_id == verdicts.c.comparison_id).scalar_subquery()
    query = select(verdicts).join(comparisons, comparisons.c.id == verdicts.c.comparison_id)
    query = query.join(candidates, candidates.c.id == verdicts.c.candidate_id)
    query = query.where(
        visible(caller), comparisons.c.state == "done", verdicts.c.edition == last, candidates.c.target.in_(targets)
    )
    async with store.database.reading() as connection:
        order = comparisons.c.created_at.desc(), comparisons.c.id.desc(), verdicts.c.id
        rows = (await connection.execute(query.order_by(*order))).all()
    return [_stored(row) for row in rows]


async def badge_of(store: Store, candidate_id: str) -> tuple[str, bool, StoredVerdict | None] | None:
    """A candidate's name, whether it can be run, and the last verdict about it, for whoever was given the address of its badge."""
    if not ID.fullmatch(candidate_id):
        return None
    name = select(candidates.c.name, candidates.c.kind).where(candidates.c.id == candidate_id)
    query = (
        select(verdicts).where(verdicts.c.candidate_id == candidate_id).order_by(verdicts.c.created_at.desc(), verdicts.c.id)
    )
    async with store.database.reading() as connection:
        named = (await connection.execute(name)).first()
        row = (await connection.execute(query.limit(1))).first()
    return None if named is None else (named.name, named.kind != "card", None if row is None else _stored(row))


def restored(values: Mapping[str, Any]) -> Verdict:
    """The verdict that `as_dict` wrote, also after it went through JSON."""

    def interval(found: Mapping[str, Any] | None) -> Interval | None:
        return Interval(**found) if found is not None else None

    worst = values.get("worst")
    parts = {
        "state": State(values["state"]),
        "reasons": tuple(Reason(reason["sentence"], tuple(reason["evidence"])) for reason in values["reasons"]),
        "interval": interval(values.get("interval")),
        "worst": Slice(**{**worst, "interval": Interval(**worst["interval"])}) if worst else None,
        "regressions": tuple(values.get("regressions", ())),
        "fixed": tuple(values.get("fixed", ())),
        "length_controlled": interval(values.get("length_controlled")),
        "held": interval(values.get("held")),
    }
    own = {field.name: values[field.name] for field in fields(Verdict) if field.name in values}
    return Verdict(**{**own, **parts})


def visible(caller: Caller) -> ColumnElement[bool]:
    """Comparisons of the caller's workspace, and of its user if it stands for one."""
    mine = comparisons.c.workspace_id == caller.workspace_id
    return mine if caller.user_id is None else mine & (comparisons.c.user_id == caller.user_id)


def missing(id: str) -> NotFound:
    """The same for an id that never was and that is another's."""
    return NotFound(f"Comparison `{id[:128]}` not found.")


async def _find(connection: AsyncConnection, caller: Caller, id: str) -> Comparison:
    rows: Sequence[Any] = ()
    if ID.fullmatch(id):
        rows = (await connection.execute(select(*OWN).where(comparisons.c.id == id, visible(caller)))).all()
    if not rows:
        raise missing(id)
    return (await _all(connection, rows))[0]


async def _all(connection: AsyncConnection, rows: Sequence[Any]) -> list[Comparison]:
    """Rows with their items."""
    mine: dict[str, list[Item]] = {row.id: [] for row in rows}
    query = select(comparison_items).where(comparison_items.c.comparison_id.in_(mine)).order_by(comparison_items.c.number)
    for item in await connection.execute(query):
        mine[item.comparison_id].append(Item(item.candidate_id, item.number, item.run_id, item.chosen_from))
    return [
        Comparison(**{**row._mapping, "plan": Plan.parse(json.loads(row.plan)), "items": tuple(mine[row.id])}) for row in rows
    ]


def _stored(row: Any) -> StoredVerdict:
    own = {field.name: getattr(row, field.name) for field in fields(StoredVerdict) if field.name != "verdict"}
    return StoredVerdict(**own, verdict=restored(json.loads(row.content)))
