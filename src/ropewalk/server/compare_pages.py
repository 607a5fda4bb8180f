"""The pages of Compare: the list, a new comparison, the Compare page and its prompts. Each works without scripts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare import candidates as known
from ropewalk.compare import records, suites
from ropewalk.compare.candidates import Candidate
from ropewalk.compare.records import Comparison, Plan
from ropewalk.errors import BadInput
from ropewalk.files.catalog import File
from ropewalk.server import compare_views as views
from ropewalk.server import words
from ropewalk.server.comparisons import as_the_api, runs_of
from ropewalk.server.shown_comparison import compare_page, prompt_page
from ropewalk.server.visitors import Visitor, address, read_fields, read_form, show, signed_in, store_of
from ropewalk.server.words import Moment

ROWS = 30
FORM_BYTES = 2_500_000  # with the text of a page
FORM_FIELDS = 200
MOST_FILES = 100  # to pick a suite from, newest first
SERVED = "served:"  # in a form, before a name that is served and may be no candidate yet


@dataclass(frozen=True)
class Row:
    """One comparison of the list."""

    id: str
    title: str
    state: str
    verdicts: tuple[tuple[str, str, str], ...]  # candidate, state, look
    created: Moment


@dataclass(frozen=True)
class ListPage:
    """/compare"""

    rows: tuple[Row, ...]
    older: str | None
    may_write: bool


@dataclass(frozen=True)
class Choice:
    """Something that a new comparison may be made of."""

    value: str
    label: str
    note: str


@dataclass(frozen=True)
class NewPage:
    """/compare/new"""

    models: tuple[Choice, ...]
    cards: tuple[Choice, ...]
    suites: tuple[Choice, ...]
    problem: str | None = None


async def list_comparisons(request: Request, visitor: Visitor) -> Response:
    store, after = store_of(request), request.query_params.get("after")
    found = await records.list_comparisons(store, visitor.caller, ROWS + 1, after)
    rows = tuple([await row_of(request, visitor, one) for one in found[:ROWS]])
    older = address("/compare", {"after": found[ROWS - 1].id}) if len(found) > ROWS else None
    return await show(request, visitor, "compare/list.html", "Compare", ListPage(rows, older, visitor.may("write")))


async def row_of(request: Request, visitor: Visitor, found: Comparison) -> Row:
    """A comparison as a line."""
    store = store_of(request)
    given = await records.latest(store, visitor.caller, found.id)
    names = await names_of(request, visitor, found)
    said = tuple((names[one.candidate_id].name, str(one.verdict.state), views.state_look(one.verdict.state)) for one in given)
    return Row(found.id, found.title, found.state, said, words.moment(found.created_at))


async def new_form(request: Request, visitor: Visitor) -> Response:
    visitor.caller.needs("write")
    return await show(request, visitor, "compare/new.html", "New comparison", await _new_page(request, visitor))


async def create(request: Request, visitor: Visitor) -> Response:
    """Makes candidates and a suite of what was picked where they are none yet, and begins."""
    fields = await read_fields(request, visitor.session, FORM_BYTES, FORM_FIELDS)
    form, store, caller = dict(fields), store_of(request), visitor.caller
    caller.needs("write")
    picked = list(dict.fromkeys(value for name, value in fields if name == "candidate"))
    if not form.get("baseline") or not picked:
        raise BadInput("a comparison needs a baseline and at least one candidate: go back and pick both")
    baseline = await _candidate(request, visitor, form["baseline"])
    others = [await _candidate(request, visitor, value) for value in picked]
    judges = [await _candidate(request, visitor, value) for name, value in fields if name == "judge" and value]
    suite_id: str | None = form.get("suite") or None
    if suite_id is not None and suite_id.startswith("file_"):
        suite_id = (await suites.add_suite(store, caller, suite_id, must_pass=form.get("must_pass") or None)).id
    tried = _count(form.get("chosen_from", ""))
    plan = Plan(judges=tuple(one.id for one in judges), stop_early=form.get("stop_early") == "yes")
    made = await records.create(
        store,
        caller,
        baseline_id=baseline.id,
        candidate_ids=[one.id for one in others],
        suite_id=suite_id,
        title=form.get("title", ""),
        plan=plan,
        chosen_from={one.id: tried for one in others} if tried > 1 else None,
    )
    await runs_of(request).start(caller, made.id)
    return RedirectResponse(f"/compare/{made.id}", 303)


async def add_cards(request: Request, visitor: Visitor) -> Response:
    """Reads a review page's text; of two tools or more it makes a comparison, about which nothing is run."""
    form = dict(await read_fields(request, visitor.session, FORM_BYTES, FORM_FIELDS))
    store, caller = store_of(request), visitor.caller
    if not form.get("page", "").strip():
        raise BadInput("no text was pasted: open a comparison page, select all of it, copy, and paste it here")
    text = form["page"].replace("\r\n", "\n")
    source = form.get("source_url", "").strip() or None
    cards = await known.add_cards(
        store, caller, text, source_url=source, source_date=form.get("source_date", "").strip() or None
    )
    if len(cards) < 2:
        return RedirectResponse(f"/candidates/{cards[0].id}", 303)
    made = await records.create(store, caller, baseline_id=cards[0].id, candidate_ids=[one.id for one in cards[1:]])
    await runs_of(request).decide(caller, made.id)
    return RedirectResponse(f"/compare/{made.id}", 303)


async def show_comparison(request: Request, visitor: Visitor) -> Response:
    found = await _comparison(request, visitor)
    names = await names_of(request, visitor, found)
    page = await compare_page(request, visitor, found, names)
    return await show(request, visitor, "compare/compare.html", found.title, page)


async def show_prompt(request: Request, visitor: Visitor) -> Response:
    found = await _comparison(request, visitor)
    names = await names_of(request, visitor, found)
    page = await prompt_page(request, visitor, found, names, request.path_params["prompt_id"])
    return await show(request, visitor, "compare/prompt.html", f"Prompt {page.number} of {found.title}", page)


async def run(request: Request, visitor: Visitor) -> Response:
    await read_form(request, visitor.session)
    await runs_of(request).start(visitor.caller, request.path_params["id"])
    return RedirectResponse(f"/compare/{request.path_params['id']}", 303)


async def cancel(request: Request, visitor: Visitor) -> Response:
    await read_form(request, visitor.session)
    await runs_of(request).cancel(visitor.caller, request.path_params["id"])
    return RedirectResponse(f"/compare/{request.path_params['id']}", 303)


async def as_json(request: Request, visitor: Visitor) -> Response:
    """What the API answers, for a session."""
    return await as_the_api(request, visitor.caller, await _comparison(request, visitor))


# -- what they share


async def names_of(request: Request, visitor: Visitor, found: Comparison) -> dict[str, Candidate]:
    """The candidates of a comparison, the baseline and its judges, by id."""
    ids = dict.fromkeys([found.baseline_id, *found.candidate_ids, *found.plan.judges])
    return {id: await known.get_candidate(store_of(request), visitor.caller, id) for id in ids}


async def _comparison(request: Request, visitor: Visitor) -> Comparison:
    return await records.get_comparison(store_of(request), visitor.caller, request.path_params["id"])


async def _candidate(request: Request, visitor: Visitor, value: str) -> Candidate:
    store = store_of(request)
    if value.startswith(SERVED):
        return await known.add_candidate(store, request.app.state.models, visitor.caller, value.removeprefix(SERVED))
    return await known.get_candidate(store, visitor.caller, value)


async def _new_page(request: Request, visitor: Visitor) -> NewPage:
    store, caller = store_of(request), visitor.caller
    listed = await asyncio.to_thread(request.app.state.models.listed, caller)
    models = tuple(Choice(SERVED + one.name, one.name, "") for one in listed)
    cards = [one for one in await known.list_candidates(store, caller, 200) if not one.runs]
    made = await suites.list_suites(store, caller, 100)
    chosen = [Choice(one.id, one.name, f"suite, {one.n_prompts:,} prompts in {one.n_groups:,} groups") for one in made]
    files: Sequence[File] = (await store.list(caller, MOST_FILES)).files
    chosen += [
        Choice(one.id, one.filename, "file, made into a suite")
        for one in files
        if not one.expired and one.filename.endswith((".jsonl", ".ndjson"))
    ]
    return NewPage(models, tuple(Choice(one.id, one.name, "card") for one in cards), tuple(chosen))


def _count(text: str) -> int:
    if text and not (text.isascii() and text.isdigit() and 0 < int(text[:6]) <= 10_000):
        raise BadInput(f"'{text[:40]}' is no number of checkpoints; expected a whole number from 1 to 10000")
    return int(text) if text else 1


_ONE = "/compare/{id}"

routes: list[BaseRoute] = [
    Route("/compare", signed_in(list_comparisons), methods=["GET"]),
    Route("/compare", signed_in(create), methods=["POST"]),
    Route("/compare/new", signed_in(new_form), methods=["GET"]),
    Route("/compare/cards", signed_in(add_cards), methods=["POST"]),
    Route(_ONE, signed_in(show_comparison), methods=["GET"]),
    Route(f"{_ONE}/json", signed_in(as_json), methods=["GET"]),
    Route(f"{_ONE}/run", signed_in(run), methods=["POST"]),
    Route(f"{_ONE}/cancel", signed_in(cancel), methods=["POST"]),
    Route(f"{_ONE}/prompts/{{prompt_id}}", signed_in(show_prompt), methods=["GET"]),
]
