"""The Messages API: create, streamed or whole, count_tokens; and a file read ahead of the first question about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.chat.messages import Ended, MessagesRequest, ReplyEvent, Retrieved
from ropewalk.engine.models import Models
from ropewalk.files.pictures import is_picture
from ropewalk.ids import new_id
from ropewalk.server import body
from ropewalk.server.auth import caller_of
from ropewalk.server.node import Node
from ropewalk.server.openapi import STRING, named, operation, record
from ropewalk.server.operations import Metrics
from ropewalk.server.streaming import Streamed
from ropewalk.server.wire import FIRST_VERSION, JSON, dialect
from ropewalk.server.wire_messages import read_request
from ropewalk.server.wire_replies import PING, ReplyWriter, sent, sent_error
from ropewalk.tenants.caller import Caller

T = TypeVar("T")

MAX_BYTES = 32_000_000


@operation(
    "ask a model; with `stream`, the answer is a text/event-stream", {200: named("Message")}, body=named("MessageRequest")
)
async def create(request: Request) -> Response:
    """POST /v1/messages"""
    asked = await _asked(request)
    writer = ReplyWriter(new_id("msg"), asked.model, asked.caching, extended=dialect(request.headers).extensions)
    events = _events(request, asked)
    if not asked.stream:
        return JSON(await unless_gone(request, _whole(writer, events)), headers=writer.headers())

    def written(event: ReplyEvent) -> Iterator[bytes]:
        for found in writer.events(event):
            yield sent(found)
            if found["type"] == "message_start":
                yield PING

    id = request.state.request_id
    reply = Streamed(events, written, lambda error: sent_error(error, id), id, ping=PING)
    if isinstance(first := await begun(request, reply), Retrieved):
        writer.take(first)
        reply.headers.update(writer.headers())
    return reply


@operation(
    "count the tokens of a request, documents included",
    {200: record({"input_tokens": {"type": "integer", "minimum": 0}})},
    body=named("MessageRequest"),
)
async def count_tokens(request: Request) -> JSON:
    """POST /v1/messages/count_tokens"""
    asked = await _asked(request, counting=True)
    models: Models = request.app.state.models
    answerer = await models.answerer(
        asked.model, caller_of(request), loaded=bool(asked.images())
    )  # only the model knows how it sees
    return JSON({"input_tokens": await unless_gone(request, answerer.count(caller_of(request), asked))})


@operation(
    "read a file ahead of the first question about it",
    {200: record({"type": STRING, "file_id": STRING, "model": STRING, "usage": {"type": "object"}})},
    body=record(
        {
            "model": {"type": "string", "description": "a served model"},
            "system": {"description": "as the question's will be: reuse needs an equal beginning"},
            "tools": {"type": "array", "items": {"type": "object"}, "description": "as the question's will be"},
            "title": STRING,
            "context": STRING,
            "citations": record({"enabled": {"type": "boolean"}}),
        },
        optional=["system", "tools", "title", "context", "citations"],
    ),
)
async def warm(request: Request) -> JSON:
    """POST /v1/files/{file_id}/warm"""
    id, found = request.path_params["file_id"], Node(await body.read_json(request, MAX_BYTES))
    found.only({"model", "system", "tools", "title", "context", "citations"})
    around = {key: value for key, value in found.value.items() if key in ("model", "system", "tools")}
    block = {key: value for key, value in found.value.items() if key in ("title", "context", "citations")}
    caller, models = caller_of(request), request.app.state.models
    file = await request.app.state.store.show(caller, id)
    block |= {"type": "image" if is_picture(file) else "document", "source": {"type": "file", "file_id": id}}
    asked = {**around, "max_tokens": 0, "messages": [{"role": "user", "content": [block]}]}
    whole = read_request(Node(asked), version_of(request))
    answerer = await models.answerer(whole.model, caller)
    usage = await unless_gone(request, answerer.warm(caller, whole))
    told = {"cache_creation_input_tokens": usage.cache_creation, "cache_read_input_tokens": usage.cache_read}
    return JSON({"type": "file_warmed", "file_id": id, "model": whole.model, "usage": told})


def version_of(request: Request) -> str:
    """The version of the API that a client speaks."""
    dialect(request.headers)
    return request.headers.get("anthropic-version", FIRST_VERSION)


async def begun(request: Request, reply: Streamed[T]) -> T | None:
    """The first event of a reply, if it comes soon; one that is not to be sent is ended."""
    try:
        return await unless_gone(request, reply.begin())
    except BaseException:
        await reply.leave()
        raise


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; it is cancelled at once if the client goes away."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _asked(request: Request, *, counting: bool = False) -> MessagesRequest:
    version = version_of(request)
    return read_request(Node(await body.read_json(request, MAX_BYTES)), version, counting=counting)


async def _events(request: Request, asked: MessagesRequest) -> AsyncGenerator[ReplyEvent, None]:
    state = request.app.state
    with state.batches.somebody_waits():
        async with aclosing(answer_of(state.models, state.metrics, caller_of(request), asked)) as events:
            async for event in events:
                yield event


async def answer_of(
    models: Models, metrics: Metrics, caller: Caller, asked: MessagesRequest
) -> AsyncGenerator[ReplyEvent, None]:
    """A reply as it comes, and counted."""
    answerer = await models.answerer(asked.model, caller)
    async with aclosing(answerer.stream(caller, asked)) as events:
        async for event in events:
            if isinstance(event, Ended):
                for kind in ("input", "cache_creation", "cache_read", "output"):
                    metrics.tokens.labels(kind).inc(getattr(event.usage, kind))
            yield event


async def _whole(writer: ReplyWriter, events: AsyncGenerator[ReplyEvent, None]) -> dict[str, Any]:
    async with aclosing(events) as opened:
        return await writer.message(opened)


routes: list[BaseRoute] = [
    Route("/v1/messages", create, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    Route("/v1/files/{file_id}/warm", warm, methods=["POST"]),
]
