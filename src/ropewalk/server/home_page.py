"""Home: what is served on which verdict, what waits for somebody, bookmarks, a field for the weekly mail, and the loop in a glance."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare import bookmarks, candidates, digest, promotions, records, subscribers, vote_counts, voters
from ropewalk.compare.records import Comparison, StoredVerdict
from ropewalk.compare.state import State
from ropewalk.errors import BadInput
from ropewalk.jobs.ledger import Job
from ropewalk.server import words
from ropewalk.server.pages import inside
from ropewalk.server.served import Slot, slot_of
from ropewalk.server.visitors import Visitor, address, read_form, show, signed_in, store_of
from ropewalk.tenants.quotas import usage
from ropewalk.tenants.token_report import report

RECENT = 50  # comparisons that are looked through for what waits
MOST_WAITING = 8
DAYS = 30  # in which questions are counted


@dataclass(frozen=True)
class Waiting:
    """Something that somebody has to do."""

    href: str
    title: str
    what: str
    look: str


@dataclass(frozen=True)
class Mark:
    """A bookmark."""

    href: str
    title: str
    kind: str
    target: str


@dataclass(frozen=True)
class Step:
    """One step of the loop, and how much there is of it."""

    label: str
    count: str
    what: str
    href: str
    next: bool  # it is the one to take now


@dataclass(frozen=True)
class HomePage:
    """/"""

    loop: tuple[Step, ...]
    advice: str  # the next step, as a sentence
    advice_href: str
    slots: tuple[Slot, ...]
    waiting: tuple[Waiting, ...]
    bookmarks: tuple[Mark, ...]
    mail: bool  # whether mail can be sent
    said: str
    may_write: bool


@dataclass(frozen=True)
class DigestLine:
    """One item of the weekly mail."""

    kind: str
    title: str
    sentence: str
    href: str


@dataclass(frozen=True)
class DigestPage:
    """/digest"""

    since: str
    until: str
    lines: tuple[DigestLine, ...]


async def home(request: Request, visitor: Visitor) -> Response:
    store, caller, state = store_of(request), visitor.caller, request.app.state
    recent = await records.list_comparisons(store, caller, RECENT)
    given = {one.id: await records.latest(store, caller, one.id) for one in recent if one.state == "done"}
    standing = await promotions.standing(store, caller, state.registry)
    aliases, listed = await asyncio.gather(
        asyncio.to_thread(state.registry.aliases), asyncio.to_thread(state.models.listed, caller)
    )
    entries, names = await asyncio.to_thread(state.registry.entries), {one.name for one in listed}
    async with store.database.reading() as connection:
        scope = ("user", f"{caller.workspace_id}/{caller.user_id}") if caller.user_id else ("workspace", caller.workspace_id)
        used = await usage(connection, *scope)
    standing_now = Counts(
        files=used.used_files,
        jobs=(await state.jobs.ledger.list(caller, RECENT)).jobs,
        trained=sum(one.kind == "adapter" and "step" not in one.lineage and one.name in names for one in entries),
        verdicts=sum(len(some) for some in given.values()),
        shippable=await _shippable(request, visitor, given),
        aliases=len(aliases),
        served=len(listed),
        questions=await _questions(request, visitor),
    )
    loop, advice, advice_href = the_loop(standing_now)
    page = HomePage(
        loop=loop,
        advice=advice,
        advice_href=advice_href,
        slots=tuple([await slot_of(request, visitor, alias, name, standing.get(alias)) for alias, name in aliases.items()]),
        waiting=tuple(await _waiting(request, visitor, recent, given)),
        bookmarks=tuple(
            Mark(f"/{'compare' if one.kind == 'comparison' else 'candidates'}/{one.target}", one.title, one.kind, one.target)
            for one in await bookmarks.list_bookmarks(store, caller)
        ),
        mail=state.mailer is not None,
        said=SAID.get(request.query_params.get("said", ""), ""),
        may_write=visitor.may("write"),
    )
    return await show(request, visitor, "compare/home.html", "Home", page)


SAID = {"asked": "A mail was sent to that address: follow its link to confirm."}


async def bookmark(request: Request, visitor: Visitor) -> Response:
    form = await read_form(request, visitor.session)
    change = bookmarks.remove_bookmark if form.get("remove") else bookmarks.add_bookmark
    await change(store_of(request), visitor.caller, form.get("target", "").replace("\0", ""))
    return RedirectResponse(inside(form.get("back")), 303)


async def subscribe(request: Request, visitor: Visitor) -> Response:
    form = await read_form(request, visitor.session)
    if not form.get("mail", "").strip():
        raise BadInput("no address was given: write one, such as ann@example.org")
    await subscribers.subscribe(store_of(request), visitor.caller, request.app.state.mailer, form["mail"].strip())
    return RedirectResponse(address("/", {"said": "asked"}), 303)


async def show_digest(request: Request, visitor: Visitor) -> Response:
    """What the weekly mail would say now."""
    found = await digest.preview(store_of(request), visitor.caller)
    lines = tuple(
        DigestLine(one.kind.replace("_", " "), one.title, one.sentence, f"/compare/{one.ref}" if one.ref else "/")
        for one in found.items
    )
    page = DigestPage(words.moment(found.since).exact, words.moment(found.until).exact, lines)
    return await show(request, visitor, "compare/digest.html", "Weekly digest", page)


@dataclass(frozen=True)
class Counts:
    """How much there is of each step."""

    files: int
    jobs: Sequence[Job]  # newest first
    trained: int
    verdicts: int
    shippable: str  # where a verdict waits to be shipped
    aliases: int
    served: int
    questions: int  # of the last days


def the_loop(now: Counts) -> tuple[tuple[Step, ...], str, str]:
    """The five steps, and which is next: the sentence, and where it leads."""
    running = next((job for job in now.jobs if job.state in ("running", "queued")), None)
    if not now.files:
        at, advice, href = 0, "Upload a file: it becomes documents that are asked about, and rows to train on.", "/files"
    elif running is not None:
        progress = f"step {running.step:,} of {running.steps:,}" if running.steps else running.state
        at, advice, href = 1, f"A training is on its way: {progress}.", f"/jobs/{running.id}"
    elif not now.trained:
        at, advice, href = 1, "Train a model on a file of rows, with OpenAI’s client or `ropewalk train`.", "/jobs"
    elif not now.verdicts:
        at, advice, href = 2, "Compare the trained model with its base: a verdict says which one to ship.", "/compare/new"
    elif now.shippable:
        at, advice, href = 3, "A verdict says SHIP: point an alias at the better model.", now.shippable
    elif not now.aliases:
        at, advice, href = 3, "Point an alias at a model, so that who asks need not know which one it is.", "/compare"
    else:
        at, advice, href = 4, "Ask the alias about a file, and see its citations and what was not read again.", "/chat"
    done = sum(job.state == "succeeded" for job in now.jobs)
    steps = (
        ("Files", f"{now.files:,}", "stored once", "/files"),
        ("Training", f"{now.trained:,}", f"models, {done:,} of jobs" if done else "models trained", "/jobs"),
        ("Comparison", f"{now.verdicts:,}", "verdicts of recorded runs", "/compare"),
        ("Shipping", f"{now.aliases:,}", "aliases served", "/models"),
        ("Questions", f"{now.questions:,}", f"in {DAYS} days", "/usage"),
    )
    return tuple(Step(*told, number == at) for number, told in enumerate(steps)), advice, href


async def _questions(request: Request, visitor: Visitor) -> int:
    caller, state = visitor.caller, request.app.state
    await state.models.ledger.flush()
    found = await report(store_of(request).database, caller.workspace_id, DAYS, lambda name: None, caller.user_id)
    return found.total.requests


async def _shippable(request: Request, visitor: Visitor, given: dict[str, list[StoredVerdict]]) -> str:
    """The first verdict that permits a move which nobody has made; '' where there is none, or none for this visitor."""
    if not visitor.may("admin"):
        return ""
    moved = {
        (one.comparison_id, one.candidate_id) for one in await promotions.list_promotions(store_of(request), visitor.caller)
    }
    waiting = (
        address(f"/compare/{id}/ship", {"candidate": said.candidate_id})
        for id, some in given.items()
        for said in some
        if said.verdict.may_ship and (id, said.candidate_id) not in moved
    )
    return next(waiting, "")


async def _waiting(
    request: Request, visitor: Visitor, recent: list[Comparison], given: dict[str, list[StoredVerdict]]
) -> list[Waiting]:
    store, caller = store_of(request), visitor.caller
    moved = {(one.comparison_id, one.candidate_id) for one in await promotions.list_promotions(store, caller)}
    found = []
    for one in recent:
        href = f"/compare/{one.id}"
        if one.state != "done":
            word = {"new": "not begun", "running": "runs now", "failed": f"ended: {one.error}"}[one.state]
            found.append(Waiting(href, one.title, word, "bad" if one.state == "failed" else "open"))
        for said in given.get(one.id, []):
            verdict = said.verdict
            candidate = await candidates.get_candidate(store, caller, said.candidate_id)
            if verdict.may_ship and (one.id, said.candidate_id) not in moved:
                found.append(Waiting(href, one.title, f"{verdict.state}: {candidate.name} may be shipped", "good"))
            elif verdict.state is State.NOT_ENOUGH and verdict.n_more:
                more = f"NOT ENOUGH: {candidate.name}, about {verdict.n_more:,} more prompts would tell"
                found.append(Waiting(href, one.title, more, "open"))
    for one in await vote_counts.waiting(store, caller, voters.who(caller), limit=MOST_WAITING):
        found.append(Waiting(f"/compare/{one.id}/vote", one.title, "has pairs that you have not voted on", "even"))
    return found[:MOST_WAITING]


routes: list[BaseRoute] = [
    Route("/", signed_in(home), methods=["GET"]),
    Route("/bookmarks", signed_in(bookmark), methods=["POST"]),
    Route("/digest", signed_in(show_digest), methods=["GET"]),
    Route("/digest/subscribe", signed_in(subscribe), methods=["POST"]),
]
