"""Fine-tuning jobs over HTTP, in the shape of OpenAI's clients; under /v1 and under /openai/v1 alike."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from ropewalk.errors import BadInput, MissingExtra, NotFound
from ropewalk.jobs.device import Device, has_gpu
from ropewalk.jobs.ledger import OPEN, Event, Job, Ledger, Limits
from ropewalk.jobs.recipe import judges_of
from ropewalk.jobs.runner import JobRunner, Options
from ropewalk.registry import Registry
from ropewalk.server import body, job_judges, wire_jobs
from ropewalk.server.auth import caller_of
from ropewalk.server.files import MAX_LIMIT, limit_of
from ropewalk.server.node import Node
from ropewalk.server.openapi import STRING, operation, query, record
from ropewalk.server.visitors import request_id_of
from ropewalk.server.wire import JSON
from ropewalk.tenants.caller import Caller

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ropewalk.server.settings import ServerSettings

DEFAULT_LIMIT, DEFAULT_CHECKPOINTS = 20, 10
LOOK_SECONDS = 0.5  # at the events of a job that somebody watches
PING_SECONDS = 10.0
SHOWN_BASES = 20
METADATA = re.compile(r"metadata\[(.{1,64})\]")
PREFIXES = ("/v1", "/openai/v1")

JOB = {
    **record({"id": STRING, "object": {"const": "fine_tuning.job"}, "status": STRING, "model": STRING}),
    "description": "as OpenAI's",
}
LIST = record(
    {"object": {"const": "list"}, "data": {"type": "array", "items": {"type": "object"}}, "has_more": {"type": "boolean"}}
)
PAGED = [
    query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}, "items of a page"),
    query("after", STRING, "only what stands after this one"),
]


@operation(
    "train an adapter on a file of one's own",
    {200: JOB},
    body=record(
        dict.fromkeys(("model", "training_file", "validation_file", "suffix"), STRING)
        | {
            "method": {"type": "object"},
            "seed": {"type": "integer"},
            "metadata": {"type": "object"},
            "ropewalk": {"type": "object"},
        },
        optional=["validation_file", "suffix", "method", "seed", "metadata", "ropewalk"],
    ),
)
async def create(request: Request) -> JSON:
    """POST /v1/fine_tuning/jobs"""
    caller_of(request).needs("write")
    asked = wire_jobs.read_new(Node(await body.read_json(request)))
    if judges_of(asked.keys) and request.app.state.settings.serving.jobs is not None:
        raise BadInput(
            "ropewalk.trl.reward_funcs: a judge is asked on the server's machine, which workers on its Ray cluster cannot reach; name "
            "another reward"
        )
    await job_judges.check(
        request.app.state.models, caller_of(request), judges_of(asked.keys), takes_turns=_runner(request).device is not None
    )
    base = await asyncio.to_thread(_base, request.app.state.registry, asked.base)
    made = await _ledger(request).submit(caller_of(request), replace(asked, base=base), request_id_of(request))
    _runner(request).look()
    return JSON(wire_jobs.job(made))


@operation(
    "list jobs, newest first",
    {200: LIST},
    parameters=[*PAGED, query("metadata[NAME]", STRING, "only jobs with this value of this name")],
)
async def list_jobs(request: Request) -> JSON:
    """GET /v1/fine_tuning/jobs"""
    asked = request.query_params
    wanted = {found[1]: value for key, value in asked.items() if (found := METADATA.fullmatch(key))}
    page = await _ledger(request).list(caller_of(request), _limit(request), asked.get("after"), wanted)
    return JSON(wire_jobs.page([await _shown(request, one) for one in page.jobs], page.more))


@operation("how far a job is", {200: JOB})
async def show(request: Request) -> JSON:
    """GET /v1/fine_tuning/jobs/{job_id}"""
    return JSON(await _shown(request, await _job(request)))


@operation("end a job for good", {200: JOB})
async def cancel(request: Request) -> JSON:
    """POST /v1/fine_tuning/jobs/{job_id}/cancel"""
    found = await _ledger(request).want(caller_of(request), request.path_params["job_id"], "cancel", request_id_of(request))
    _runner(request).look()
    return JSON(await _shown(request, found))


@operation("have a job wait, with a checkpoint", {200: JOB})
async def pause(request: Request) -> JSON:
    """POST /v1/fine_tuning/jobs/{job_id}/pause"""
    found = await _ledger(request).want(caller_of(request), request.path_params["job_id"], "pause", request_id_of(request))
    return JSON(await _shown(request, found))


@operation("go on with a paused or failed job, from its newest checkpoint", {200: JOB})
async def resume(request: Request) -> JSON:
    """POST /v1/fine_tuning/jobs/{job_id}/resume"""
    found = await _ledger(request).resume(caller_of(request), request.path_params["job_id"], request_id_of(request))
    _runner(request).look()
    return JSON(await _shown(request, found))


@operation(
    "what happened in a job, newest first; with `stream`, in its order as it happens, as text/event-stream",
    {200: LIST},
    parameters=[*PAGED, query("stream", {"type": "boolean"}, "until the job ends")],
)
async def list_events(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs/{job_id}/events"""
    found, ledger, asked = await _job(request), _ledger(request), request.query_params
    if asked.get("stream", "false").lower() in ("true", "1"):
        return StreamingResponse(
            _stream(ledger, caller_of(request), found), 200, {"cache-control": "no-store"}, "text/event-stream"
        )
    events, more = await ledger.events(caller_of(request), found.id, _limit(request), asked.get("after"))
    return JSON(wire_jobs.page([wire_jobs.event(one) for one in events], more))


@operation("states of the model that a job has kept, newest first", {200: LIST}, parameters=PAGED)
async def list_checkpoints(request: Request) -> JSON:
    """GET /v1/fine_tuning/jobs/{job_id}/checkpoints"""
    found, asked = await _job(request), request.query_params
    measured = await _ledger(request).steps(found.id)
    # Older ones may have been removed; the newest may lie with the server that runs the job alone.
    there = {
        *await asyncio.to_thread(_runner(request).folder_of(found.id).checkpoints),
        *await _runner(request).archive.steps(found.id),
    }
    steps = sorted((step for step, one in measured.items() if "checkpoint" in one and step in there), reverse=True)
    if (after := asked.get("after")) is not None:
        ids = [wire_jobs.checkpoint_id(found, step) for step in steps]
        if after not in ids:
            raise NotFound(f"Checkpoint `{after[:128]}` not found.")
        steps = steps[ids.index(after) + 1 :]
    limit = limit_of(request) if "limit" in asked else DEFAULT_CHECKPOINTS
    data = [wire_jobs.checkpoint(found, step, measured[step]) for step in steps[:limit]]
    return JSON(wire_jobs.page(data, len(steps) > limit))


@operation("what a job's run has said so far", {200: STRING}, answer_media="text/plain")
async def show_log(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs/{job_id}/log"""
    found = await _job(request)
    return Response(await _runner(request).log_of(found), media_type="text/plain", headers={"cache-control": "no-store"})


async def _stream(ledger: Ledger, caller: Caller, job: Job) -> AsyncIterator[bytes]:
    last, told_at = 0, time.monotonic()
    while True:
        # Looked at before its events: what a job tells when it ends is then among them.
        ended = (await ledger.show(caller, job.id)).state not in OPEN
        events: list[Event] = [*await ledger.since(job.id, last)]
        for one in events:
            yield f"data: {json.dumps(wire_jobs.event(one), separators=(',', ':'))}\n\n".encode()
        if events:
            last, told_at = events[-1].number, time.monotonic()
            continue
        if ended:
            yield b"data: [DONE]\n\n"
            return
        if time.monotonic() > told_at + PING_SECONDS:
            told_at = time.monotonic()
            yield b": still there\n\n"
        await asyncio.sleep(LOOK_SECONDS)


def runner_of(app: Starlette) -> JobRunner:
    """The worker of this application."""
    settings: ServerSettings = app.state.settings
    store = app.state.store
    limits = Limits(settings.jobs_running, settings.jobs_queued, settings.jobs_file_bytes)
    data = store.settings.data.expanduser().resolve()
    cluster = settings.serving.jobs
    if cluster is not None and find_spec("ray") is None:
        raise MissingExtra("ray", "cluster", "`jobs: ray`")
    # A vLLM server and a cluster have GPUs of their own: nobody makes room.
    beside = settings.serving.vllm is None and cluster is None
    shared = beside and settings.serving.engine.device != "cpu" and has_gpu()
    device = Device(data / "device", app.state.models) if shared else None
    options = Options(settings.jobs_at_once, settings.job_grace_seconds, cluster=cluster)
    ledger = Ledger(store, limits, settings.job_lease_seconds)
    return JobRunner(ledger, app.state.registry, data / "jobs", options, device, job_judges.asks(app.state.models))


def _base(registry: Registry, name: str) -> str:
    """The name of a base that is published, or that an alias points at."""
    try:
        entry = registry.resolve(name)
    except NotFound:
        entry = None
    if entry is None or entry.kind != "base":
        known = [one.name for one in registry.entries() if one.kind == "base"][:SHOWN_BASES]
        raise BadInput(
            f"model: '{name[:100]}' is no base that is published here; expected {', '.join(known) or 'one, and there is none yet'}"
        )
    return entry.name


async def _shown(request: Request, found: Job) -> dict[str, Any]:
    return wire_jobs.job(found, await _ledger(request).error(found) if found.error_code is not None else None)


async def _job(request: Request) -> Job:
    return await _ledger(request).show(caller_of(request), request.path_params["job_id"])


def _limit(request: Request) -> int:
    return limit_of(request) if "limit" in request.query_params else DEFAULT_LIMIT


def _runner(request: Request) -> JobRunner:
    runner: JobRunner = request.app.state.jobs
    return runner


def _ledger(request: Request) -> Ledger:
    return _runner(request).ledger


def routes_under(prefix: str) -> list[BaseRoute]:
    """The routes, under one prefix."""
    jobs = f"{prefix}/fine_tuning/jobs"
    return [
        Route(jobs, create, methods=["POST"]),
        Route(jobs, list_jobs),
        Route(f"{jobs}/{{job_id}}", show),
        Route(f"{jobs}/{{job_id}}/cancel", cancel, methods=["POST"]),
        Route(f"{jobs}/{{job_id}}/pause", pause, methods=["POST"]),
        Route(f"{jobs}/{{job_id}}/resume", resume, methods=["POST"]),
        Route(f"{jobs}/{{job_id}}/events", list_events),
        Route(f"{jobs}/{{job_id}}/checkpoints", list_checkpoints),
        Route(f"{jobs}/{{job_id}}/log", show_log),
    ]


routes: list[BaseRoute] = [route for prefix in PREFIXES for route in routes_under(prefix)]
