"""The application: one table of routes, what happens around each request, and the one place where an error becomes an answer."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ropewalk.compare.runner import ComparisonRunner
from ropewalk.engine.models import Models
from ropewalk.files.integrity import scrub_step
from ropewalk.files.lifecycle import sweep
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.server import (
    admin,
    batches,
    candidate_pages,
    chat,
    compare_pages,
    comparisons,
    digest,
    elsewhere,
    extensions,
    facts,
    files,
    fine_tuning,
    home_page,
    job_pages,
    logs,
    messages,
    model_pages,
    models,
    openai_chat,
    openai_embeddings,
    openai_files,
    openai_models,
    openapi,
    operations,
    pages,
    questions,
    ship_pages,
    usage,
    vote_pages,
)
from ropewalk.server.auth import admit, allowance_of
from ropewalk.server.comparison_runs import ComparisonRuns
from ropewalk.server.denied import write_down
from ropewalk.server.openai_errors import PREFIX, headers_of, is_openai, refusal
from ropewalk.server.operations import Metrics
from ropewalk.server.question_runs import QuestionRuns
from ropewalk.server.settings import ServerSettings
from ropewalk.server.wire import JSON, Failure, failure
from ropewalk.shared_registry import open_registry
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.denials import Denials
from ropewalk.tenants.limits import Limits
from ropewalk.tracing import request_seconds, request_span

API = ("/v1/", PREFIX)  # what lies under them needs a key
THOROUGH_SECONDS = 3600.0  # between two sweeps that look at every stored name and every row
DISCONNECTED = 499  # in the log only: the client went away before it was answered

ROUTES: list[BaseRoute] = [
    *extensions.routes,
    *questions.routes,
    *files.routes,
    *messages.routes,
    *batches.routes,
    *models.routes,
    *openai_models.routes,
    *openai_files.routes,
    *openai_embeddings.routes,
    *openai_chat.routes,
    *fine_tuning.routes,
    *comparisons.routes,
    *admin.routes,
    *operations.routes,
    *openapi.routes,
    *chat.routes,
    *usage.routes,
    *job_pages.routes,
    *model_pages.routes,
    *home_page.routes,
    *vote_pages.routes,
    *ship_pages.routes,
    *compare_pages.routes,
    *candidate_pages.routes,
    *facts.routes,
    *digest.routes,
    *pages.routes,
]


def create_app(store: Store, settings: ServerSettings | None = None) -> Starlette:
    """The server over an open store; closing the store is its opener's."""
    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(Front)],
        exception_handlers={HTTPException: _raise},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.store = store
    app.state.settings = settings = settings or ServerSettings()
    app.state.registry = registry = open_registry(store.settings.data, store.settings.database_url)
    store.adapters_of = registry.trained_on
    app.state.models = Models(store, registry, settings.serving)
    app.state.limits = Limits(settings.requests_per_minute)
    app.state.denials = Denials(store.database)
    app.state.metrics = Metrics()
    app.state.batches = batches.runner_of(app)
    app.state.questions = QuestionRuns(store, app.state.batches.ledger, app.state.models)
    app.state.jobs = fine_tuning.runner_of(app)
    app.state.models.bring = app.state.jobs.bring
    app.state.mailer = digest.mailer_of(settings)
    app.state.comparisons = ComparisonRuns(store, ComparisonRunner(store, app.state.models))
    app.state.draining = False
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    working = [asyncio.create_task(_sweep(app)), asyncio.create_task(app.state.models.preload())]
    working.append(asyncio.create_task(app.state.batches.run()))
    working.append(asyncio.create_task(app.state.questions.run()))
    working.append(asyncio.create_task(app.state.comparisons.run()))
    working.append(asyncio.create_task(app.state.jobs.run()))
    working.append(asyncio.create_task(digest.send_digests(app)))
    working.append(asyncio.create_task(elsewhere.follow(app.state.store, app.state.models)))
    try:
        yield
    finally:
        for task in working:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await app.state.models.close()
        app.state.registry.close()


async def _sweep(app: Starlette) -> None:
    store, settings, thorough_at = app.state.store, app.state.settings, 0.0
    while True:
        await asyncio.sleep(settings.sweep_seconds)
        try:
            thorough = time.monotonic() >= thorough_at  # at the first round, after what may have been a crash
            await sweep(store, thorough=thorough)
            if thorough:
                thorough_at = time.monotonic() + THOROUGH_SECONDS
            scrubbed = await scrub_step(store, round(settings.scrub_bytes_per_second * settings.sweep_seconds))
            for id, reason in scrubbed.damaged.items():
                logs.event("file_damaged", logging.ERROR, file=id, reason=reason)
            app.state.metrics.sweeps.labels("ok").inc()
        except Exception as error:  # the next round tries again
            app.state.metrics.sweeps.labels("failed").inc()
            logs.event("sweep_failed", logging.ERROR, error)


async def _raise(request: Request, error: Exception) -> Any:
    raise error


class Front:
    """Around each request: its id, its caller, its error if it has one, its log line and its numbers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        request = Request(scope, exchange.receive, exchange.send)
        told = {"http.request.method": request.method, "ropewalk.request_id": exchange.request_id}
        with request_span(request.headers, told) as end:
            await self._exchange(exchange, request)
            end(exchange.told)

    async def _exchange(self, exchange: Exchange, request: Request) -> None:
        scope = exchange.scope
        request.state.request_id = exchange.request_id
        metrics: Metrics = scope["app"].state.metrics
        metrics.in_progress.inc()
        caught: BaseException | None = None
        try:
            if scope["path"].startswith(API):
                await admit(request)
            if "\0" in scope["path"]:  # PostgreSQL cannot be asked for such a text, and nothing has it in its id
                raise HTTPException(404)
            await self.app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.status = DISCONNECTED
        except Exception as error:
            caught = error
            # An answer that has begun cannot be taken back: it is left incomplete, and the connection is closed.
            if exchange.status is None:
                await _answer(error, request, exchange)
        finally:
            metrics.in_progress.dec()
            exchange.close(metrics, caught)
        if caught is not None:
            await write_down(request, caught)


async def _answer(error: Exception, request: Request, exchange: Exchange) -> None:
    """The one error handler."""
    shown = _of_router(error, request) if isinstance(error, HTTPException) else failure(error)
    headers: dict[str, str] = dict(getattr(error, "headers", None) or {})
    if shown.status == 405:  # the router names the methods of one route; a path has several
        headers = {"allow": ", ".join(_allowed(request))}
    if shown.retry_after is not None:
        headers["retry-after"] = str(math.ceil(shown.retry_after))
    # The SDK repeats what failed with 409 or 5xx; where that cannot help, or would do the same thing twice, it is told so.
    if shown.status == 409 or getattr(request.state, "committed", False):
        headers["x-should-retry"] = "false"
    if is_openai(request.url.path):
        response = refusal(shown, error, headers)
    else:
        response = JSON(shown.body(exchange.request_id), shown.status, headers)
    await response(request.scope, exchange.receive, exchange.send)


def _of_router(error: HTTPException, request: Request) -> Failure:
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        return Failure(404, "not_found_error", f"There is no {where} here; /openapi.json lists what there is.")
    if error.status_code == 405:
        return Failure(405, "invalid_request_error", f"{where}: expected {' or '.join(_allowed(request))}.")
    return Failure(error.status_code, "invalid_request_error", error.detail)


def _allowed(request: Request) -> list[str]:
    matching = [
        route for route in request.app.routes if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE
    ]
    return sorted({method for route in matching for method in route.methods or ()})


class Exchange:
    """One request and its answer, as they are counted."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.request_id = new_id("req")
        self.status: int | None = None
        self.received = self.sent = 0
        self.told: dict[str, Any] = {}  # of its span, once it has ended
        self._began = time.perf_counter()

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *self._headers()]
        else:
            self.sent += len(message.get("body", b""))
        await self._send(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        values = {"request-id": self.request_id}
        caller: Caller | None = self.scope["state"].get("caller")
        if caller is not None:
            values |= {"anthropic-organization-id": caller.organization_id, "anthropic-workspace-id": caller.workspace_id}
        allowance = allowance_of(Request(self.scope))
        values |= headers_of(self.request_id, allowance) if is_openai(self.scope["path"]) else allowance.headers()
        return [(name.encode(), value.encode("latin-1")) for name, value in values.items()]

    def close(self, metrics: Metrics, error: BaseException | None) -> None:
        """Counts the request and writes its line."""
        seconds = time.perf_counter() - self._began
        route = getattr(self.scope.get("route"), "path", None) or "none"
        method = self.scope["method"] if route != "none" else "any"  # a stranger's words make no new counters
        status = self.status or DISCONNECTED
        metrics.requests.labels(method, route, str(status)).inc()
        metrics.seconds.labels(method, route).observe(seconds)
        self.told = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        request_seconds(seconds, self.told)
        metrics.received.labels(route).inc(self.received)
        metrics.sent.labels(route).inc(self.sent)
        caller: Caller | None = self.scope["state"].get("caller")
        broken = error is not None and (status == 500 or status < 400)  # below 400: the answer had begun
        logs.event(
            "request",
            logging.ERROR if broken else logging.INFO,
            error if broken else None,
            request_id=self.request_id,
            workspace_id=caller.workspace_id if caller else None,
            key_id=caller.key_id if caller else None,
            method=method,
            route=route,
            status=status,
            error_code=getattr(error, "error_code", None),
            failed=type(error).__name__ if error is not None else None,
            ms=round(seconds * 1000, 2),
            received=self.received,
            sent=self.sent,
        )
