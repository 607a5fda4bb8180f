"""Models in the browser: what is served under which alias and on which verdict, and where each model comes from."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare import promotions, records
from ropewalk.compare.candidates import Candidate, get_candidate
from ropewalk.compare.promotions import Promotion
from ropewalk.compare.records import StoredVerdict
from ropewalk.engine.models import Listed
from ropewalk.errors import NotFound
from ropewalk.files.generators import generators
from ropewalk.jobs.ledger import Job
from ropewalk.jobs.runner import JobRunner
from ropewalk.registry import Entry
from ropewalk.server import compare_views as views
from ropewalk.server import words
from ropewalk.server.lineage import ALIAS, FILE, JOB, MODEL, SOURCE, VERDICT, Drawing, Graph
from ropewalk.server.served import Slot, slot_of
from ropewalk.server.visitors import Visitor, address, show, signed_in, store_of
from ropewalk.server.words import Moment

DRAWN = 12  # models of the drawing, the newest and those that are served by an alias
STATES = {"succeeded": "good", "failed": "bad"}


@dataclass(frozen=True)
class Model:
    """A model that answers by a name of its own, or by one of the serving configuration."""

    name: str
    over: str  # its base, for an adapter
    job: str  # that has made it
    longest: str
    made: Moment
    aliases: tuple[str, ...]
    verdict: str
    interval: str
    look: str
    ship: str  # where it can be shipped; '' where no verdict permits it


@dataclass(frozen=True)
class ModelsPage:
    """/models"""

    slots: tuple[Slot, ...]
    models: tuple[Model, ...]
    checkpoints: int  # of jobs, which are served too and not listed
    drawing: Drawing | None
    may_write: bool


@dataclass(frozen=True)
class Known:
    """What the page is made of."""

    entries: dict[str, Entry]  # that the visitor may see, oldest first
    aliases: dict[str, str]
    jobs: dict[str, Job]  # that have made one of them, or are yet to make one
    given: tuple[tuple[StoredVerdict, Candidate], ...]  # newest first
    standing: dict[str, Promotion]


async def show_models(request: Request, visitor: Visitor) -> Response:
    listed: list[Listed] = await asyncio.to_thread(request.app.state.models.listed, visitor.caller)
    known = await _known(request, visitor, {one.name for one in listed})
    drawing = await _drawn(request, visitor, known)
    slots = [await slot_of(request, visitor, alias, to, known.standing.get(alias)) for alias, to in known.aliases.items()]
    page = ModelsPage(
        tuple(slots),
        tuple([_model(visitor, one, known) for one in listed if one.name not in known.aliases and not _kept(known, one.name)]),
        sum(_kept(known, one.name) for one in listed),
        drawing,
        visitor.may("write"),
    )
    return await show(request, visitor, "models.html", "Models", page)


async def _known(request: Request, visitor: Visitor, names: set[str]) -> Known:
    state, store, caller = request.app.state, store_of(request), visitor.caller
    entries = {one.name: one for one in await asyncio.to_thread(state.registry.entries)}
    runner: JobRunner = state.jobs
    seen = {name: entry for name, entry in sorted(entries.items(), key=lambda item: item[1].created) if name in names}
    made_by = {entry.lineage["job"] for entry in seen.values() if "job" in entry.lineage}
    jobs = {one.id: one for one in await runner.ledger.belonging(caller, made_by)}
    said = await records.verdicts_about(store, caller, names)
    about = {id: await get_candidate(store, caller, id) for id in {one.candidate_id for one in said}}
    given = tuple((one, about[one.candidate_id]) for one in said)
    aliases = await asyncio.to_thread(state.registry.aliases)
    return Known(seen, aliases, jobs, given, await promotions.standing(store, caller, state.registry))


def _kept(known: Known, name: str) -> bool:
    """Whether it is a checkpoint that a job has kept."""
    return name in known.entries and "step" in known.entries[name].lineage


def _verdict(known: Known, name: str) -> tuple[StoredVerdict, Candidate] | None:
    return next((found for found in known.given if found[1].target == name), None)


def _model(visitor: Visitor, listed: Listed, known: Known) -> Model:
    entry = known.entries.get(listed.name)
    found = _verdict(known, listed.name)
    aliases = tuple(alias for alias, name in known.aliases.items() if name == listed.name)
    may = found is not None and found[0].verdict.may_ship and visitor.may("admin") and not aliases
    return Model(
        listed.name,
        (entry.base or "") if entry is not None else "",
        job if entry is not None and (job := entry.lineage.get("job", "")) in known.jobs else "",
        f"{listed.longest:,}" if listed.longest else "–",
        words.moment(round(datetime.fromisoformat(listed.created).timestamp() * 1e6)),
        aliases,
        str(found[0].verdict.state) if found is not None else "",
        str(found[0].verdict.interval or "") if found is not None else "",
        views.state_look(found[0].verdict.state) if found is not None else "",
        address(f"/compare/{found[0].comparison_id}/ship", {"candidate": found[1].id}) if found is not None and may else "",
    )


# -- the drawing


async def _drawn(request: Request, visitor: Visitor, known: Known) -> Drawing | None:
    graph = Graph()
    served = [name for name in dict.fromkeys(known.aliases.values()) if name in known.entries]
    newest = [name for name in reversed(known.entries) if not _kept(known, name)]
    for name in list(dict.fromkeys([*served, *newest]))[:DRAWN]:
        await _drawn_model(graph, request, visitor, known, known.entries[name])
    for job in known.jobs.values():
        if job.model is None and job.state in ("queued", "running", "paused"):
            await _drawn_job(graph, request, visitor, job)
    return graph.drawn()


async def _drawn_model(graph: Graph, request: Request, visitor: Visitor, known: Known, entry: Entry) -> None:
    job = known.jobs.get(entry.lineage.get("job", ""))
    made_of = [await _drawn_job(graph, request, visitor, job)] if job is not None else []
    if job is None:
        files = [id for id in entry.lineage.get("file", "").replace(",", " ").split() if id.startswith("file_")]
        made_of = [await _drawn_file(graph, request, visitor, id) for id in files]
        made_of += _unwritten(graph, made_of, entry.lineage.get("data_generator", "").split())
    note = f"over {entry.base}" if entry.base else "base"
    model = graph.add(MODEL, f"model {entry.name}", _plain(entry.name), _plain(note), address("/chat", {"model": entry.name}))
    for one in made_of:
        graph.link(one, model)
    for verdict, candidate in known.given:
        if candidate.target == entry.name:
            state, href = verdict.verdict.state, f"/compare/{verdict.comparison_id}"
            said = graph.add(
                VERDICT,
                f"verdict {verdict.id}",
                str(state),
                str(verdict.verdict.interval or "").partition(" (")[0],
                href,
                views.state_look(state),
            )
            graph.link(model, said)
    for alias, name in known.aliases.items():
        if name == entry.name:
            by = known.standing.get(alias)
            shown = graph.add(
                ALIAS,
                f"alias {alias}",
                _plain(alias),
                "shipped on a verdict" if by else "set by hand",
                "",
                "good" if by else "",
            )
            on = f"verdict {by.verdict_id}" if by is not None and by.verdict_id is not None else ""
            graph.link(on if any(one.id == (by.verdict_id if by else None) for one, _ in known.given) else model, shown)


async def _drawn_job(graph: Graph, request: Request, visitor: Visitor, job: Job) -> str:
    files = [await _drawn_file(graph, request, visitor, id) for id in dict.fromkeys(job.file_ids)]
    files += _unwritten(graph, files, job.data_generator or ())
    note = f"{job.method}, {job.state}"
    key = graph.add(JOB, f"job {job.id}", f"job {job.id[-8:]}", note, f"/jobs/{job.id}", STATES.get(job.state, "open"))
    for file in files:
        graph.link(file, key)
    return key


async def _drawn_file(graph: Graph, request: Request, visitor: Visitor, id: str) -> str:
    try:
        file = await store_of(request).show(visitor.caller, id)
    except NotFound:
        return graph.add(FILE, f"file {id}", f"…{id[-8:]}", "deleted, or another's", "", "gone")
    sources = [await _drawn_source(graph, request, visitor, one) for one in (file.lineage or {}).get("files", ())]
    sources += [_drawn_generator(graph, name) for name in generators(file)]
    key = graph.add(FILE, f"file {id}", _plain(file.filename), words.size(file.size), f"/files/{id}")
    for source in sources:
        graph.link(source, key)
    return key


async def _drawn_source(graph: Graph, request: Request, visitor: Visitor, id: str) -> str:
    """A document from which rows were written."""
    try:
        file = await store_of(request).show(visitor.caller, id)
    except NotFound:
        return graph.add(SOURCE, f"source {id}", f"…{id[-8:]}", "deleted, or another's", "", "gone")
    return graph.add(SOURCE, f"source {id}", _plain(file.filename), words.size(file.size), f"/files/{id}")


def _drawn_generator(graph: Graph, name: str) -> str:
    return graph.add(SOURCE, f"generator {name}", _plain(name), "wrote the rows")


def _unwritten(graph: Graph, files: list[str], names: Iterable[str]) -> list[str]:
    """The models that wrote rows of files that do not say so any more."""
    return [_drawn_generator(graph, name) for name in names if not any(graph.linked(f"generator {name}", key) for key in files)]


def _plain(name: str) -> str:
    """A name in which nothing hides, as one text."""
    return "".join(part.text for part in words.parts(name))


routes: list[BaseRoute] = [Route("/models", signed_in(show_models), methods=["GET"])]
