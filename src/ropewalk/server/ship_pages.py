"""Shipping and rolling back: each is asked once more before it is done, and an override is red and says why."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare import candidates as known
from ropewalk.compare import promotions, records, ship
from ropewalk.errors import BadInput, NotFound
from ropewalk.server import compare_views as views
from ropewalk.server import words
from ropewalk.server.visitors import Visitor, address, read_form, show, signed_in, store_of
from ropewalk.server.words import Moment


@dataclass(frozen=True)
class ShipPage:
    """/compare/{id}/ship"""

    id: str
    title: str
    candidate: views.Named
    verdict: views.ShownVerdict | None
    alias: str
    aliases: tuple[tuple[str, str], ...]  # alias, what it serves
    against: str  # why the rule does not permit it; '' where it does, or no alias is chosen yet
    chosen: bool


@dataclass(frozen=True)
class RollbackPage:
    """/rollback"""

    alias: str
    now: str
    before: str
    since: Moment | None
    why: str


async def ship_form(request: Request, visitor: Visitor) -> Response:
    """Which alias, then what speaks against it, then the button."""
    visitor.caller.needs("admin")
    store, caller, state = store_of(request), visitor.caller, request.app.state
    found = await records.get_comparison(store, caller, request.path_params["id"])
    candidate = await known.get_candidate(store, caller, request.query_params.get("candidate", ""))
    if candidate.id not in found.candidate_ids:
        raise known.missing(candidate.id)
    baseline = await known.get_candidate(store, caller, found.baseline_id)
    aliases = state.registry.aliases()
    served = [alias for alias, name in aliases.items() if name == baseline.target or alias == baseline.target]
    chosen = request.query_params.get("alias", "").strip()
    alias = chosen or (served[0] if len(served) == 1 else "")
    given = next((one for one in await records.latest(store, caller, found.id) if one.candidate_id == candidate.id), None)
    against = ""
    if alias:
        against = await ship.may(store, state.models, state.registry, caller, found.id, candidate.id, alias) or ""
    names = {candidate.id: candidate, baseline.id: baseline}
    page = ShipPage(
        found.id,
        found.title,
        views.named(candidate),
        views.shown_verdict(given, names, {}) if given else None,
        alias,
        tuple(aliases.items()),
        against,
        bool(alias),
    )
    return await show(request, visitor, "compare/ship.html", "Ship", page)


async def ship_it(request: Request, visitor: Visitor) -> Response:
    form = await read_form(request, visitor.session)
    id, override = request.path_params["id"], form.get("override", "").strip()
    if not form.get("alias", "").strip():
        raise BadInput("no alias was named: go back and name the one that shall serve it")
    if "override" in form and not override:
        raise BadInput("an override says why: go back and write the reason")
    state = request.app.state
    await ship.ship(
        store_of(request),
        state.models,
        state.registry,
        visitor.caller,
        id,
        form.get("candidate", ""),
        form["alias"].strip(),
        override=override or None,
    )
    return RedirectResponse(f"/compare/{id}", 303)


async def rollback_form(request: Request, visitor: Visitor) -> Response:
    visitor.caller.needs("admin")
    state, alias = request.app.state, request.query_params.get("alias", "")
    history = state.registry.history(alias)
    if len(history) < 2:
        raise BadInput(f"alias '{alias}' has pointed at nothing but '{history[-1]}': there is nothing to go back to")
    by = (await promotions.standing(store_of(request), visitor.caller, state.registry)).get(alias)
    since = None if by is None else words.moment(by.created_at)
    page = RollbackPage(alias, history[-1], history[-2], since, (by.override_reason or "") if by else "")
    return await show(request, visitor, "compare/rollback.html", "Roll back", page)


async def roll_back(request: Request, visitor: Visitor) -> Response:
    form = await read_form(request, visitor.session)
    visitor.caller.needs("admin")
    state, alias = request.app.state, form.get("alias", "")
    if alias not in state.registry.aliases():
        raise NotFound(f"no alias '{alias[:200]}'")
    await ship.rollback(store_of(request), state.models, state.registry, visitor.caller, alias)
    return RedirectResponse(address("/", {}), 303)


routes: list[BaseRoute] = [
    Route("/compare/{id}/ship", signed_in(ship_form), methods=["GET"]),
    Route("/compare/{id}/ship", signed_in(ship_it), methods=["POST"]),
    Route("/rollback", signed_in(rollback_form), methods=["GET"]),
    Route("/rollback", signed_in(roll_back), methods=["POST"]),
]
