"""The Message Batches API: many requests at once, answered when there is time, results to be fetched for a month."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import BaseRoute, Route

from ropewalk.batches.ledger import Asked, Item, Ledger
from ropewalk.engine.models import Models
from ropewalk.ids import new_id
from ropewalk.server import body, logs
from ropewalk.server.auth import caller_of
from ropewalk.server.batch_runner import BatchRunner
from ropewalk.server.files import MAX_LIMIT, limit_of
from ropewalk.server.messages import answer_of, version_of
from ropewalk.server.openapi import STRING, named, operation, query, record
from ropewalk.server.operations import Metrics
from ropewalk.server.wire import JSON, failure
from ropewalk.server.wire_batches import (
    BatchReader,
    batch_body,
    batch_deleted,
    batch_list,
    errored,
    read_item,
    result_line,
    succeeded,
)
from ropewalk.server.wire_replies import ReplyWriter

if TYPE_CHECKING:
    from starlette.applications import Starlette

MAX_BYTES = 256_000_000
PIECE = 1 << 18  # bytes that are read at a time, in a thread: a large body keeps nobody waiting
DEFAULT_LIMIT = 20


@operation(
    "answer many requests in the background",
    {200: named("Batch")},
    body=record({"requests": {"type": "array", "items": record({"custom_id": STRING, "params": {"type": "object"}})}}),
)
async def create(request: Request) -> JSON:
    """POST /v1/messages/batches"""
    made = await _ledger(request).create(caller_of(request), version_of(request), _asked(request))
    request.app.state.batches.look()
    return JSON(batch_body(made))


@operation(
    "list batches, newest first",
    {200: named("BatchList")},
    parameters=[
        query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}, "batches of a page"),
        query("after_id", STRING, "only what stands after this one"),
        query("before_id", STRING, "only what stands before this one"),
    ],
)
async def list_batches(request: Request) -> JSON:
    """GET /v1/messages/batches"""
    version_of(request)
    asked = request.query_params
    limit = limit_of(request) if "limit" in asked else DEFAULT_LIMIT
    page = await _ledger(request).list(caller_of(request), limit, asked.get("after_id"), asked.get("before_id"))
    return JSON(batch_list(page))


@operation("how far a batch is", {200: named("Batch")})
async def show(request: Request) -> JSON:
    """GET /v1/messages/batches/{batch_id}"""
    version_of(request)
    return JSON(batch_body(await _ledger(request).show(caller_of(request), request.path_params["batch_id"])))


@operation("answer no more requests of a batch", {200: named("Batch")})
async def cancel(request: Request) -> JSON:
    """POST /v1/messages/batches/{batch_id}/cancel"""
    version_of(request)
    found = await _ledger(request).cancel(caller_of(request), request.path_params["batch_id"])
    request.app.state.batches.look()
    return JSON(batch_body(found))


@operation("delete a batch that has ended", {200: record({"id": STRING, "type": {"const": "message_batch_deleted"}})})
async def delete(request: Request) -> JSON:
    """DELETE /v1/messages/batches/{batch_id}"""
    version_of(request)
    id = request.path_params["batch_id"]
    await _ledger(request).delete(caller_of(request), id)
    return JSON(batch_deleted(id))


@operation("the results of a batch that has ended, one in a line", {200: STRING}, answer_media="application/x-jsonl")
async def results(request: Request) -> StreamingResponse:
    """GET /v1/messages/batches/{batch_id}/results"""
    version_of(request)
    found = await _ledger(request).results(caller_of(request), request.path_params["batch_id"])

    async def lines() -> AsyncIterator[bytes]:
        async for custom_id, outcome, result in found:
            yield result_line(custom_id, outcome, result)

    return StreamingResponse(lines(), 200, {"cache-control": "no-store"}, "application/x-jsonl")


async def _asked(request: Request) -> AsyncIterator[list[Asked]]:
    """The requests of a body, while it comes."""
    reader, piece, received = BatchReader(), bytearray(), 0
    async for chunk in body.read(request):
        received += len(chunk)
        if received > MAX_BYTES:
            raise body.too_large(request, f"the body has more than {MAX_BYTES:,} bytes; send several batches")
        piece += chunk
        if len(piece) >= PIECE:
            yield await asyncio.to_thread(reader.feed, bytes(piece))
            piece.clear()
    yield await asyncio.to_thread(reader.feed, bytes(piece), last=True)


def runner_of(app: Starlette) -> BatchRunner:
    """The worker of this application."""
    settings = app.state.settings
    ledger = Ledger(app.state.store.database, app.state.store.vault, settings.batch_lease_seconds)
    return BatchRunner(ledger, lambda item: _answer(app, item), _failed, settings.batch_requests)


async def _answer(app: Starlette, item: Item) -> Mapping[str, Any]:
    """One request, answered like any other; none of its own connection waits for it."""
    models: Models = app.state.models
    metrics: Metrics = app.state.metrics
    asked = read_item(item.params, item.batch.version)
    writer = ReplyWriter(new_id("msg"), asked.model, asked.caching)
    async with aclosing(answer_of(models, metrics, item.batch.owner, asked)) as events:
        return succeeded(await writer.message(events))


def _failed(error: BaseException) -> Mapping[str, Any]:
    """The result of a request that came to nothing; what is our own fault is in the log, under the id that it names."""
    request_id = new_id("req")
    if failure(error).status == 500:
        logs.event("batch_request_failed", logging.ERROR, error, request_id=request_id)
    return errored(error, request_id)


def _ledger(request: Request) -> Ledger:
    runner: BatchRunner = request.app.state.batches
    return runner.ledger


routes: list[BaseRoute] = [
    Route("/v1/messages/batches", create, methods=["POST"]),
    Route("/v1/messages/batches", list_batches),
    Route("/v1/messages/batches/{batch_id}", show),
    Route("/v1/messages/batches/{batch_id}", delete, methods=["DELETE"]),
    Route("/v1/messages/batches/{batch_id}/cancel", cancel, methods=["POST"]),
    Route("/v1/messages/batches/{batch_id}/results", results),
]
