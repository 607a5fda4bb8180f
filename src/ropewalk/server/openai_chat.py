"""Chat completions and completions: OpenAI's shapes over the models that /v1/messages asks, by the same way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.chat.messages import Block, Document, Ended, FileId, Image, MessagesRequest, ReplyEvent, Retrieved
from ropewalk.engine.models import Models
from ropewalk.errors import NotFound
from ropewalk.files.pictures import is_picture
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.server import body
from ropewalk.server.auth import caller_of
from ropewalk.server.messages import MAX_BYTES, begun, unless_gone
from ropewalk.server.node import Node
from ropewalk.server.openai_models import unknown
from ropewalk.server.openai_replies import DONE, ChatWriter, CompletionWriter, Writer, sent_error
from ropewalk.server.openai_sampling import Told
from ropewalk.server.openai_wire import read_chat, read_completion
from ropewalk.server.operations import Metrics
from ropewalk.server.streaming import Streamed
from ropewalk.server.wire import JSON
from ropewalk.tenants.caller import Caller

AHEAD = 256  # events that wait for a client that reads slowly, before the models wait as well
Indexed = tuple[int, ReplyEvent]  # a choice, and what it brings


async def chat(request: Request) -> Response:
    """POST /openai/v1/chat/completions"""
    caller = caller_of(request)
    asked, told = read_chat(Node(await body.read_json(request, MAX_BYTES)))
    asked = await shown(request.app.state.store, caller, asked)
    writer = ChatWriter(new_id("chatcmpl"), asked.model, told, asked.samples)
    return await _answered(request, [asked], told, writer)


async def completions(request: Request) -> Response:
    """POST /openai/v1/completions"""
    asked = await asyncio.to_thread(read_completion, Node(await body.read_json(request, MAX_BYTES)))
    first = asked.requests[0]
    writer = CompletionWriter(new_id("cmpl"), first.model, asked.told, first.samples, len(asked.requests))
    return await _answered(request, asked.requests, asked.told, writer)


async def _answered(request: Request, asked: Sequence[MessagesRequest], told: Told, writer: Writer) -> Response:
    events = _events(request, asked)
    if not told.stream:

        async def whole() -> None:
            async with aclosing(events) as opened:
                async for index, event in opened:
                    writer.take(index, event)

        await unless_gone(request, whole())
        return JSON(writer.whole(), headers=writer.headers())
    reply = Streamed(events, lambda found: writer.chunks(*found), sent_error, request.state.request_id, last=DONE)
    first = await begun(request, reply)
    if first is not None and isinstance(first[1], Retrieved):
        writer.take(*first)
        reply.headers.update(writer.headers())
    return reply


async def _events(request: Request, asked: Sequence[MessagesRequest]) -> AsyncGenerator[Indexed, None]:
    state = request.app.state
    caller = caller_of(request)
    with state.batches.somebody_waits():
        parts = [samples_of(state.models, state.metrics, caller, one, number * one.samples) for number, one in enumerate(asked)]
        async with aclosing(together(parts)) as events:
            async for found in events:
                yield found


async def samples_of(
    models: Models, metrics: Metrics, caller: Caller, asked: MessagesRequest, first: int = 0
) -> AsyncGenerator[Indexed, None]:
    """All replies of one request as they come, numbered from `first`, and counted."""
    try:
        answerer = await models.answerer(asked.model, caller)
    except NotFound:
        raise unknown(asked.model) from None
    ended = 0
    async with aclosing(answerer.samples(caller, asked)) as events:
        async for sample, event in events:
            if isinstance(event, Ended):
                for kind in ("input", "cache_creation", "cache_read") if not ended else ():
                    metrics.tokens.labels(kind).inc(getattr(event.usage, kind))
                metrics.tokens.labels("output").inc(event.usage.output)
                ended += 1
            yield first + sample, event


async def together(parts: Sequence[AsyncGenerator[Indexed, None]]) -> AsyncGenerator[Indexed, None]:
    """What several bring, as it comes; closing it ends them all."""
    if len(parts) == 1:
        async with aclosing(parts[0]) as only:
            async for found in only:
                yield found
        return
    coming: asyncio.Queue[Indexed | BaseException | None] = asyncio.Queue(AHEAD)

    async def run(part: AsyncGenerator[Indexed, None]) -> None:
        try:
            async with aclosing(part) as events:
                async for found in events:
                    await coming.put(found)
            await coming.put(None)
        except Exception as error:
            await coming.put(error)

    running = [asyncio.create_task(run(part)) for part in parts]
    left = len(running)
    try:
        while left:
            match await coming.get():
                case None:
                    left -= 1
                case BaseException() as error:
                    raise error
                case found:
                    yield found
    finally:
        for task in running:
            task.cancel()
        for task in running:
            with suppress(asyncio.CancelledError):
                await task


async def shown(store: Store, caller: Caller, asked: MessagesRequest) -> MessagesRequest:
    """The same request, with files that are pictures as pictures: OpenAI's `file` parts do not tell."""
    pictures = {id for id in asked.files() if is_picture(await store.show(caller, id))}
    if not pictures:
        return asked

    def block(found: Block) -> Block:
        is_shown = isinstance(found, Document) and isinstance(found.source, FileId) and found.source.id in pictures
        return Image(found.source) if is_shown and isinstance(found, Document) else found

    return replace(asked, turns=tuple(replace(turn, blocks=tuple(map(block, turn.blocks))) for turn in asked.turns))


routes: list[BaseRoute] = [
    Route("/openai/v1/chat/completions", chat, methods=["POST"]),
    Route("/openai/v1/completions", completions, methods=["POST"]),
]
