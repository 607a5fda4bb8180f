"""Compare over HTTP: candidates, suites, comparisons, what became of each prompt, votes, and what is served because of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ropewalk.compare import candidates as known
from ropewalk.compare import judges, measures, records, ship, suites, voters, votes
from ropewalk.compare.diff import Change
from ropewalk.compare.outcomes import counts, outcomes
from ropewalk.errors import BadInput, NotFound
from ropewalk.server import body, wire_comparisons
from ropewalk.server.auth import caller_of
from ropewalk.server.comparison_runs import ComparisonRuns
from ropewalk.server.files import DEFAULT_LIMIT, MAX_LIMIT, limit_of
from ropewalk.server.node import Node
from ropewalk.server.openapi import STRING, named, nullable, operation, query, record
from ropewalk.server.visitors import store_of
from ropewalk.server.wire import JSON
from ropewalk.tenants.caller import Caller

MAX_BYTES = 32_000_000  # of a suite, or of a page's text, in a body
Item = TypeVar("Item")
LISTED = [
    query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}, "items of a page"),
    query("after_id", STRING, "only what stands after this one"),
]
LIST = named("CompareList")


# -- candidates


@operation(
    "add a candidate: what is served by a name, or the cards of a review page's text",
    {200: record({"data": {"type": "array", "items": named("Candidate")}})},
    body=record(
        {"name": STRING, "page_text": STRING, "source_url": STRING, "source_date": STRING},
        optional=["name", "page_text", "source_url", "source_date"],
    ),
)
async def add_candidate(request: Request) -> JSON:
    """POST /v1/candidates"""
    asked = Node(await body.read_json(request, MAX_BYTES))
    asked.only({"name", "page_text", "source_url", "source_date"})
    store, caller = store_of(request), caller_of(request)
    if (asked.get("name") is None) == (asked.get("page_text") is None):
        raise BadInput("expected either 'name', of a model that is served, or 'page_text', the text of a review page")
    if (name := asked.get("name")) is not None:
        found = [await known.add_candidate(store, request.app.state.models, caller, name.text(1, 200))]
    else:
        source = {key: one.text(0, 2000) for key in ("source_url", "source_date") if (one := asked.get(key)) is not None}
        text = asked.need("page_text").text(1, wire_comparisons.MAX_PAGE)
        found = await known.add_cards(store, caller, text, **source)
    return JSON({"data": [wire_comparisons.candidate(one, await _claims(request, one)) for one in found]})


@operation("list candidates, newest first", {200: LIST}, parameters=LISTED)
async def list_candidates(request: Request) -> JSON:
    """GET /v1/candidates"""
    return await _page(request, known.list_candidates, lambda one: wire_comparisons.candidate(one))


@operation("a candidate, with what a card claims", {200: named("Candidate")})
async def show_candidate(request: Request) -> JSON:
    """GET /v1/candidates/{candidate_id}"""
    found = await known.get_candidate(store_of(request), caller_of(request), request.path_params["candidate_id"])
    return JSON(wire_comparisons.candidate(found, await _claims(request, found)))


@operation(
    "say which candidate a card is about, so that its claims can be tested",
    {200: named("Candidate")},
    body=record({"candidate": STRING}),
)
async def link(request: Request) -> JSON:
    """POST /v1/candidates/{candidate_id}/link"""
    asked = Node(await body.read_json(request))
    asked.only({"candidate"})
    other = asked.need("candidate").text(1, wire_comparisons.MAX_ID)
    found = await known.link(store_of(request), caller_of(request), request.path_params["candidate_id"], other)
    return JSON(wire_comparisons.candidate(found, await _claims(request, found)))


# -- suites


@operation(
    "make a suite of prompts from a stored file, or from JSONL",
    {200: named("Suite")},
    body=record(
        {"file_id": STRING, "jsonl": STRING, "name": STRING, "group": STRING, "must_pass": STRING}
        | {"hold": {"type": "number"}, "margin": {"type": "number"}},
        optional=["file_id", "jsonl", "name", "group", "must_pass", "hold", "margin"],
    ),
)
async def add_suite(request: Request) -> JSON:
    """POST /v1/suites"""
    asked = Node(await body.read_json(request, MAX_BYTES))
    asked.only({"file_id", "jsonl", "name", "group", "must_pass", "hold", "margin"})
    file, text = asked.get("file_id"), asked.get("jsonl")
    if file is not None and text is None:
        source: str | bytes = file.text(1, 128)
    elif text is not None and file is None:
        source = text.text(1).encode()
    else:
        raise BadInput('expected either \'file_id\' or \'jsonl\', lines such as {"prompt": "...", "reference": "..."}')
    more: dict[str, Any] = {key: one.text(0, 200) for key in ("name", "group", "must_pass") if (one := asked.get(key))}
    more |= {key: one.number(0, 1) for key in ("hold", "margin") if (one := asked.get(key))}
    return JSON(wire_comparisons.suite(await suites.add_suite(store_of(request), caller_of(request), source, **more)))


@operation("list suites, newest first", {200: LIST}, parameters=LISTED)
async def list_suites(request: Request) -> JSON:
    """GET /v1/suites"""
    return await _page(request, suites.list_suites, wire_comparisons.suite)


@operation("what is known about a suite", {200: named("Suite")})
async def show_suite(request: Request) -> JSON:
    """GET /v1/suites/{suite_id}"""
    found = await suites.get_suite(store_of(request), caller_of(request), request.path_params["suite_id"])
    return JSON(wire_comparisons.suite(found))


@operation(
    "delete a suite: its prompts and every answer to them; verdicts and figures stay",
    {200: record({"id": STRING, "type": {"const": "suite_deleted"}})},
)
async def delete_suite(request: Request) -> JSON:
    """DELETE /v1/suites/{suite_id}"""
    id = request.path_params["suite_id"]
    await suites.delete_suite(store_of(request), caller_of(request), id)
    return JSON({"id": id, "type": "suite_deleted"})


# -- comparisons


@operation(
    "make a comparison, and run it",
    {200: named("Comparison")},
    body=record(
        {
            "baseline": STRING,
            "candidates": {"type": "array", "items": STRING},
            "suite": STRING,
            "title": STRING,
            "category": STRING,
            "judges": {"type": "array", "items": STRING},
            "sampling": {"type": "object"},
            "stop_early": {"type": "boolean"},
            "budget": {"type": "number"},
            "limits": {"type": "object"},
            "samples": {"type": "integer"},
            "seed": {"type": "integer"},
            "chosen_from": {"type": "object", "description": "candidate -> out of how many checkpoints it was taken"},
            "run": {"type": "boolean", "description": "false: do not begin yet"},
        },
        optional="suite title category judges sampling stop_early budget limits samples seed chosen_from run".split(),
    ),
)
async def create(request: Request) -> JSON:
    """POST /v1/comparisons"""
    asked = Node(await body.read_json(request))
    made = await records.create(store_of(request), caller_of(request), **wire_comparisons.read_new(asked))
    if (run := asked.get("run")) is None or run.boolean():
        made = await runs_of(request).start(caller_of(request), made.id)
    return await _shown(request, made)


@operation("list comparisons, newest first", {200: LIST}, parameters=LISTED)
async def list_comparisons(request: Request) -> JSON:
    """GET /v1/comparisons"""
    return await _page(request, records.list_comparisons, lambda one: wire_comparisons.comparison(one))


@operation("a comparison: its verdicts, what was measured, its judges, and opinions by themselves", {200: named("Comparison")})
async def show(request: Request) -> JSON:
    """GET /v1/comparisons/{comparison_id}"""
    return await _shown(request, await _comparison(request))


@operation(
    "what became of each prompt under one candidate",
    {200: record({"data": {"type": "array", "items": {"type": "object"}}, "counts": {"type": "object"}, "has_more": {}})},
    parameters=[
        query("outcome", {"enum": list(Change)}, "only prompts that broke, were fixed, ..."),
        query("candidate", STRING, "the candidate; the first one where left out"),
        *LISTED,
    ],
)
async def list_prompts(request: Request) -> JSON:
    """GET /v1/comparisons/{comparison_id}/prompts"""
    found, asked, limit = await _comparison(request), request.query_params, limit_of(request)
    candidate = asked.get("candidate") or found.candidate_ids[0]
    if candidate not in found.candidate_ids:
        raise NotFound(f"Candidate `{candidate[:128]}` not found.")
    wanted = asked.get("outcome")
    if wanted is not None and wanted not in list(Change):
        raise BadInput(f"outcome: '{wanted[:40]}' is none; expected {', '.join(Change)}")
    became = await outcomes(store_of(request), caller_of(request), found, candidate)
    shown = [one for one in became if wanted is None or one.change == wanted]
    ids = [one.prompt.id for one in shown]
    start = 0 if "after_id" not in asked else ids.index(asked["after_id"]) + 1 if asked["after_id"] in ids else len(ids)
    page = [wire_comparisons.outcome(one) for one in shown[start : start + limit]]
    listed = wire_comparisons.page_of(page, len(shown) > start + limit)
    return JSON({**listed, "candidate": candidate, "counts": {str(kind): n for kind, n in counts(became).items()}})


@operation("begin a comparison, or go on with it: what was answered is not asked again", {200: named("Comparison")})
async def run(request: Request) -> JSON:
    """POST /v1/comparisons/{comparison_id}/run"""
    return await _shown(request, await runs_of(request).start(caller_of(request), request.path_params["comparison_id"]))


@operation("stop a comparison; what was answered is kept", {200: named("Comparison")})
async def cancel(request: Request) -> JSON:
    """POST /v1/comparisons/{comparison_id}/cancel"""
    return await _shown(request, await runs_of(request).cancel(caller_of(request), request.path_params["comparison_id"]))


# -- votes


@operation("a pair of answers to vote on, blind", {200: nullable(named("Ticket"))})
async def ticket(request: Request) -> JSON:
    """POST /v1/comparisons/{comparison_id}/tickets"""
    caller, id = caller_of(request), request.path_params["comparison_id"]
    found = await votes.next_ticket(store_of(request), caller, id, voters.who(caller))
    return JSON(None if found is None else wire_comparisons.ticket(found))


@operation(
    "vote on a pair; what it was between is told afterwards",
    {200: named("Vote")},
    body=record({"ticket": STRING, "choice": {"enum": list(votes.CHOICES)}, "ms": {"type": "integer"}}, optional=["ms"]),
)
async def vote(request: Request) -> JSON:
    """POST /v1/comparisons/{comparison_id}/votes"""
    asked = Node(await body.read_json(request))
    asked.only({"ticket", "choice", "ms"})
    await _comparison(request)
    ms = asked.get("ms")
    done = await votes.cast(
        store_of(request),
        caller_of(request),
        asked.need("ticket").text(1, 200),
        asked.need("choice").text(1, 20),
        0 if ms is None else ms.integer(0, 86_400_000),
    )
    return JSON({"type": "vote", **asdict(done)})


# -- what is served because of it


@operation(
    "serve a candidate by an alias, if its verdict permits or an override says why",
    {200: named("Promotion")},
    body=record({"candidate": STRING, "alias": STRING, "override": STRING}, optional=["override"]),
)
async def ship_candidate(request: Request) -> JSON:
    """POST /v1/comparisons/{comparison_id}/ship"""
    asked = Node(await body.read_json(request))
    asked.only({"candidate", "alias", "override"})
    state, why = request.app.state, asked.get("override")
    done = await ship.ship(
        store_of(request),
        state.models,
        state.registry,
        caller_of(request),
        request.path_params["comparison_id"],
        asked.need("candidate").text(1, wire_comparisons.MAX_ID),
        asked.need("alias").text(1, 200),
        override=None if why is None else why.text(1, 2000),
    )
    return JSON(done.as_dict())


@operation("serve by an alias what it served before", {200: record({"alias": STRING, "name": STRING})})
async def rollback(request: Request) -> JSON:
    """POST /v1/aliases/{alias}/rollback"""
    state, alias = request.app.state, request.path_params["alias"]
    await ship.rollback(store_of(request), state.models, state.registry, caller_of(request), alias)
    return JSON({"alias": alias, "name": state.registry.aliases()[alias]})


# -- what they share


def runs_of(request: Request) -> ComparisonRuns:
    found: ComparisonRuns = request.app.state.comparisons
    return found


async def _comparison(request: Request) -> records.Comparison:
    return await records.get_comparison(store_of(request), caller_of(request), request.path_params["comparison_id"])


async def _claims(request: Request, found: known.Candidate) -> Sequence[known.StoredClaim]:
    return [] if found.card is None else await known.card_claims(store_of(request), caller_of(request), found.id)


async def _shown(request: Request, found: records.Comparison) -> JSON:
    return await as_the_api(request, caller_of(request), found)


async def as_the_api(request: Request, caller: Caller, found: records.Comparison) -> JSON:
    """A comparison whole; measured and opinion stand apart."""
    store = store_of(request)
    shown = wire_comparisons.comparison(found, await records.latest(store, caller, found.id))
    runs = [item.run_id for item in found.items if item.run_id]
    shown["measured"] = [
        wire_comparisons.figure(one) for run in runs for one in await measures.measurements(store, caller, run)
    ]
    shown["judges"] = [wire_comparisons.judge(one) for one in await judges.judges(store, caller, found.id)]
    progress = runs_of(request).progress_of(found.id)
    shown["progress"] = None if progress is None else {"done": progress.done, "total": progress.total, "doing": progress.doing}
    return JSON(shown)


async def _page(
    request: Request, items: Callable[..., Awaitable[list[Item]]], as_json: Callable[[Item], Mapping[str, Any]]
) -> JSON:
    limit = limit_of(request)
    found = await items(store_of(request), caller_of(request), limit + 1, request.query_params.get("after_id"))
    return JSON(wire_comparisons.page_of([as_json(one) for one in found[:limit]], len(found) > limit))


_ONE = "/v1/comparisons/{comparison_id}"

routes: list[BaseRoute] = [
    Route("/v1/candidates", add_candidate, methods=["POST"]),
    Route("/v1/candidates", list_candidates),
    Route("/v1/candidates/{candidate_id}", show_candidate),
    Route("/v1/candidates/{candidate_id}/link", link, methods=["POST"]),
    Route("/v1/suites", add_suite, methods=["POST"]),
    Route("/v1/suites", list_suites),
    Route("/v1/suites/{suite_id}", show_suite),
    Route("/v1/suites/{suite_id}", delete_suite, methods=["DELETE"]),
    Route("/v1/comparisons", create, methods=["POST"]),
    Route("/v1/comparisons", list_comparisons),
    Route(_ONE, show),
    Route(f"{_ONE}/prompts", list_prompts),
    Route(f"{_ONE}/run", run, methods=["POST"]),
    Route(f"{_ONE}/cancel", cancel, methods=["POST"]),
    Route(f"{_ONE}/tickets", ticket, methods=["POST"]),
    Route(f"{_ONE}/votes", vote, methods=["POST"]),
    Route(f"{_ONE}/ship", ship_candidate, methods=["POST"]),
    Route("/v1/aliases/{alias}/rollback", rollback, methods=["POST"]),
]
