"""Home: what is served on which verdict, what waits for somebody, bookmarks, a field for the weekly mail, and the loop in a glance."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare import bookmarks, candidates, digest, promotions, records, subscribers, vote_counts, voters
from ropewalk.compare.records import Comparison, StoredVerdict
from ropewalk.compare.state import State
from ropewalk.errors import BadInput
from ropewalk.server import compare_views as views
from ropewalk.server import words
from ropewalk.server.pages import inside
from ropewalk.server.visitors import Visitor, address, read_form, show, signed_in, store_of
from ropewalk.server.words import Moment
from ropewalk.tenants.quotas import usage

RECENT = 50  # comparisons that are looked through for what waits
MOST_WAITING = 8


@dataclass(frozen=True)
class Slot:
    """What an alias serves."""

    alias: str
    name: str
    since: Moment | None
    verdict: str
    look: str
    href: str | None
    override: str
    may_roll_back: bool


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
class Station:
    """One part of the loop, and how much there is of it."""

    label: str
    count: str
    what: str
    href: str | None


@dataclass(frozen=True)
class HomePage:
    """/"""

    loop: tuple[Station, ...]
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
    entries = await asyncio.to_thread(state.registry.entries)
    async with store.database.reading() as connection:
        scope = ("user", f"{caller.workspace_id}/{caller.user_id}") if caller.user_id else ("workspace", caller.workspace_id)
        used = await usage(connection, *scope)
    decided = sum(len(some) for some in given.values())
    trained = sum(entry.kind == "adapter" for entry in entries)
    page = HomePage(
        loop=(
            Station("Files", f"{used.used_files:,}", "stored once, read once", "/files"),
            Station("Training", f"{trained:,}", "adapters published", None),
            Station("Models", f"{len(listed):,}", "served", "/chat"),
            Station("Verdicts", f"{decided:,}", "of recorded runs", "/compare"),
        ),
        slots=tuple([await _slot(request, visitor, alias, name, standing.get(alias)) for alias, name in aliases.items()]),
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


async def _slot(request: Request, visitor: Visitor, alias: str, name: str, by: promotions.Promotion | None) -> Slot:
    """An alias with the verdict that it got there by."""
    verdict, look, href = "", "even", None
    if by is not None and by.comparison_id is not None:
        href = f"/compare/{by.comparison_id}"
        given = await records.editions(store_of(request), visitor.caller, by.comparison_id)
        on = next((one for one in given if one.id == by.verdict_id), None)
        if on is not None:
            verdict, look = f"{on.verdict.state} {on.verdict.interval or ''}".strip(), views.state_look(on.verdict.state)
    return Slot(
        alias,
        name,
        None if by is None else words.moment(by.created_at),
        verdict,
        look,
        href,
        (by.override_reason or "") if by else "",
        visitor.may("admin") and by is not None,
    )


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
