"""Jobs in the browser: the list, and one job with its loss, its log and its last events, which are looked at again while it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from ropewalk.errors import NotFound
from ropewalk.jobs.ledger import OPEN, Job, Ledger
from ropewalk.jobs.recipe import reproducing
from ropewalk.jobs.runner import JobRunner
from ropewalk.server import words
from ropewalk.server.visitors import Visitor, read_form, request_id_of, show, signed_in, store_of
from ropewalk.server.wire_jobs import ERASED
from ropewalk.server.words import Moment, Part

LISTED, EVENTS = 50, 12
LOOKS = {"succeeded": "good", "failed": "bad", "cancelled": "", "paused": "", "queued": ""}
WIDTH, HEIGHT, POINTS = 700.0, 220.0, 400  # of the plot; a longer curve is thinned


@dataclass(frozen=True)
class Row:
    """A job as a line of the list."""

    id: str
    status: str
    look: str
    base: str
    method: str
    progress: str
    made: Moment


@dataclass(frozen=True)
class JobsPage:
    """/jobs"""

    rows: tuple[Row, ...]
    older: str


@dataclass(frozen=True)
class Curve:
    """Losses as a line: places in the drawing, and the last value."""

    name: str
    look: str
    points: str
    last: str


@dataclass(frozen=True)
class Plot:
    """The drawing of a job's losses."""

    curves: tuple[Curve, ...]
    low: str
    high: str
    steps: str


@dataclass(frozen=True)
class Line:
    """An event."""

    at: Moment
    text: str
    bad: bool


@dataclass(frozen=True)
class JobPage:
    """/jobs/{id}"""

    id: str
    status: str
    look: str
    runs: bool  # it is looked at again
    may_cancel: bool
    may_pause: bool
    may_resume: bool
    may_forget: bool  # give up what a failed one keeps
    kept: Moment | None  # until when that is
    figures: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str, tuple[Part, ...]], ...]  # what for, id ('': deleted), name
    model: str
    error: str
    plot: Plot | None
    events: tuple[Line, ...]
    log: str
    config: str
    seed: int


async def list_jobs(request: Request, visitor: Visitor) -> Response:
    page = await _ledger(request).list(visitor.caller, LISTED, request.query_params.get("after"))
    older = f"/jobs?after={page.jobs[-1].id}" if page.more else ""
    return await show(request, visitor, "jobs.html", "Jobs", JobsPage(tuple(map(_row, page.jobs)), older))


async def show_job(request: Request, visitor: Visitor) -> Response:
    ledger = _ledger(request)
    job = await ledger.show(visitor.caller, request.path_params["id"])
    events, _ = await ledger.events(visitor.caller, job.id, EVENTS)
    error = (await ledger.error(job) or ERASED) if job.error_code is not None else ""
    steps = await ledger.steps(job.id)
    log = await _runner(request).log_of(job)
    may, stopping = visitor.may("write"), job.wanted is not None
    page = JobPage(
        id=job.id,
        status=_status(job),
        look=LOOKS.get(job.state, "open"),
        runs=job.state in ("queued", "running"),
        may_cancel=may and job.state in OPEN and not stopping,
        may_pause=may and job.state in ("queued", "running") and not stopping,
        may_resume=may and job.resumable,
        may_forget=may and job.state == "failed" and job.resumable,
        kept=words.moment(job.kept_until) if job.kept_until is not None and job.resumable else None,
        figures=tuple(_figures(job, steps)),
        files=tuple([await _file(request, visitor, what, id) for what, id in _files(job)]),
        model=job.model or "",
        error=error,
        plot=_plot(job, steps),
        events=tuple(Line(words.moment(one.created_at), one.message, one.level != "info") for one in events),
        log=log,
        config=json.dumps(reproducing(job.method, job.config), indent=2, ensure_ascii=False),
        seed=job.seed,
    )
    return await show(request, visitor, "job.html", f"Job {job.id[-8:]}", page)


async def cancel(request: Request, visitor: Visitor) -> Response:
    return await _asked(request, visitor, "cancel")


async def pause(request: Request, visitor: Visitor) -> Response:
    return await _asked(request, visitor, "pause")


async def resume(request: Request, visitor: Visitor) -> Response:
    return await _asked(request, visitor, "resume")


async def _asked(request: Request, visitor: Visitor, what: str) -> Response:
    await read_form(request, visitor.session)
    id, ledger = request.path_params["id"], _ledger(request)
    if what == "resume":
        await ledger.resume(visitor.caller, id, request_id_of(request))
    else:
        await ledger.want(visitor.caller, id, "cancel" if what == "cancel" else "pause", request_id_of(request))
    _runner(request).look()
    return RedirectResponse(f"/jobs/{id}", 303)


def _row(job: Job) -> Row:
    progress = f"step {job.step:,} of {job.steps:,}" if job.steps else "–"
    return Row(job.id, _status(job), LOOKS.get(job.state, "open"), job.base, job.method, progress, words.moment(job.created_at))


def _status(job: Job) -> str:
    if job.wanted is not None and job.state == "running":
        return {"cancel": "being cancelled", "pause": "being paused"}[job.wanted]
    return job.status.replace("_", " ")


def _figures(job: Job, steps: Mapping[int, Mapping[str, Any]]) -> list[tuple[str, str]]:
    losses = [one["train_loss"] for _, one in sorted(steps.items()) if "train_loss" in one]
    found = [("Base", job.base), ("Method", job.method), ("Steps", f"{job.step:,} of {job.steps:,}" if job.steps else "–")]
    if losses:
        found.append(("Loss", f"{losses[0]:.3f} to {losses[-1]:.3f}"))
    if job.trained_tokens:
        found.append(("Tokens", f"{job.trained_tokens:,}"))
    if job.started_at is not None and job.finished_at is not None:
        found.append(("Took", f"{(job.finished_at - job.started_at) / 1e6:,.0f} s"))
    if job.device_time:
        found.append(("Device time", words.duration(job.device_time / 1e6)))
    if job.data_generator:
        found.append(("Rows written by", ", ".join(job.data_generator)))
    return found


def _plot(job: Job, steps: Mapping[int, Mapping[str, Any]]) -> Plot | None:
    named = (("training loss", "train_loss", "first"), ("validation loss", "valid_loss", "second"))
    series = [
        (name, look, [(step, one[key]) for step, one in sorted(steps.items()) if key in one]) for name, key, look in named
    ]
    values = [value for _, _, points in series for _, value in points if math.isfinite(value)]
    if len(values) < 2:
        return None
    low, high, last = min(values), max(values), max(job.steps or 1, *steps)

    def place(step: int, value: float) -> str:
        return f"{WIDTH * step / last:.1f},{HEIGHT * (high - value) / ((high - low) or 1.0):.1f}"

    curves = [
        Curve(name, look, " ".join(place(*point) for point in _thinned(points)), f"{points[-1][1]:.4f}")
        for name, look, points in series
        if points
    ]
    return Plot(tuple(curves), f"{low:.3g}", f"{high:.3g}", f"{last:,}")


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    finite = [point for point in points if math.isfinite(point[1])]
    every = max(1, len(finite) // POINTS)
    return [point for number, point in enumerate(finite) if number % every == 0 or number == len(finite) - 1]


def _files(job: Job) -> list[tuple[str, str]]:
    return [("Training file", job.training_file), *([("Validation file", job.validation_file)] if job.validation_file else [])]


async def _file(request: Request, visitor: Visitor, what: str, id: str) -> tuple[str, str, tuple[Part, ...]]:
    try:
        found = await store_of(request).show(visitor.caller, id)
    except NotFound:
        return what, "", words.parts("deleted")
    return what, id, words.parts(found.filename)


def _ledger(request: Request) -> Ledger:
    return _runner(request).ledger


def _runner(request: Request) -> JobRunner:
    runner: JobRunner = request.app.state.jobs
    return runner


_ONE = "/jobs/{id}"
routes: list[BaseRoute] = [
    Route("/jobs", signed_in(list_jobs), methods=["GET"]),
    Route(_ONE, signed_in(show_job), methods=["GET"]),
    Route(f"{_ONE}/cancel", signed_in(cancel), methods=["POST"]),
    Route(f"{_ONE}/pause", signed_in(pause), methods=["POST"]),
    Route(f"{_ONE}/resume", signed_in(resume), methods=["POST"]),
]
