"""The chat page: a model, files of the workspace, questions; and the page that shows a file's chunks.

With scripts the reply comes as it is made (`text/event-stream`); without, the same form answers with the whole page.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from ropewalk.chat.messages import Document, FileId, Image, MessagesRequest, ReplyEvent, Text, Turn
from ropewalk.chat.retrieval import chunks
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput
from ropewalk.files.catalog import File
from ropewalk.files.documents import document
from ropewalk.files.pictures import is_picture
from ropewalk.server import logs, views, wire, words
from ropewalk.server.answers import Answer, Hearing, Said, thread_of
from ropewalk.server.messages import answer_of
from ropewalk.server.visitors import Visitor, address, read_fields, request_id_of, show, signed_in, store_of
from ropewalk.server.wire_replies import sent
from ropewalk.server.words import Part

FORM_BYTES = 2_000_000  # with what was said before
MOST_FILES = 100  # to pick from, newest first
MOST_TOKENS = 2048  # of a reply
QUESTION = 20_000  # characters
CHUNKS = 50  # on a page
PING_SECONDS = 10.0
PING = b": still there\n\n"


@dataclass(frozen=True)
class Picked:
    """A file that can be asked about."""

    id: str
    name: tuple[Part, ...]
    badge: str
    chosen: bool


@dataclass(frozen=True)
class ChatPage:
    """/chat"""

    models: tuple[str, ...]
    model: str
    files: tuple[Picked, ...]
    more: bool  # there are older files than those
    thread: str = "[]"  # questions and replies, as the form sends them back
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class ShownChunk:
    """A chunk, and where it stands."""

    number: int
    heading: str
    begin: int
    end: int
    characters: str
    tokens: str | None
    text: str


@dataclass(frozen=True)
class ChunksPage:
    """/files/{id}/chunks"""

    id: str
    name: tuple[Part, ...]
    size: int
    count: int
    meanings: str  # the embeddings model; '' where words alone are compared
    shown: tuple[ShownChunk, ...]
    earlier: str | None
    later: str | None


@dataclass(frozen=True)
class Asked:
    """What a form asks."""

    model: str
    question: str
    files: list[File]
    thread: list[tuple[str, str]] = field(default_factory=list)

    def request(self) -> MessagesRequest:
        """The conversation; files stand at its beginning, so that what was read of them is used again."""
        shown = tuple(_shown(file) for file in self.files)
        turns: list[Turn] = []
        for question, reply in self.thread:
            turns += [Turn("user", (Text(question),)), Turn("assistant", (Text(reply),))]
        turns.append(Turn("user", (Text(self.question),)))
        turns[0] = Turn("user", (*shown, *turns[0].blocks))
        return MessagesRequest(self.model, MOST_TOKENS, tuple(turns), temperature=0.0, stream=True)


def _shown(file: File) -> Document | Image:
    return Image(FileId(file.id)) if is_picture(file) else Document(FileId(file.id), file.filename, citations=True)


async def chat(request: Request, visitor: Visitor) -> Response:
    return await _page(request, visitor, request.query_params.get("model", ""), request.query_params.getlist("file"))


async def ask(request: Request, visitor: Visitor) -> Response:
    """The reply: as it comes to a script, else as a page."""
    fields = await read_fields(request, visitor.session, FORM_BYTES, MOST_FILES + 8)
    form = dict(fields)
    visitor.caller.needs("read")
    chosen = list(dict.fromkeys(value for name, value in fields if name == "file"))
    question = form.get("question", "").strip()
    if not question:
        raise BadInput("nothing was asked: write a question")
    if len(question) > QUESTION:
        raise BadInput(f"the question has {len(question):,} characters; at most {QUESTION:,} are expected")
    files = [await store_of(request).show(visitor.caller, id.replace("\0", "")) for id in chosen]
    asked = Asked(form.get("model", ""), question, files, thread_of(form.get("thread", "")))
    if "text/event-stream" in request.headers.get("accept", ""):
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(_told(request, visitor, asked), media_type="text/event-stream", headers=headers)
    hearing = Hearing()
    async with aclosing(_reply(request, visitor, asked)) as events:
        async for event in events:
            hearing.take(event)
    answer = await _answer(request, visitor, asked, hearing)
    before = [Answer(n, q, (Said(a, ()),), (), (), None) for n, (q, a) in enumerate(asked.thread, 1)]
    return await _page(request, visitor, asked.model, chosen, _thread(asked, answer), (*before, answer))


async def show_chunks(request: Request, visitor: Visitor) -> Response:
    """A file as it is cut where it is longer than a model's context."""
    store, id = store_of(request), request.path_params["id"]
    file = await store.show(visitor.caller, id)
    read = await document(store, visitor.caller, id)
    size = request.app.state.settings.serving.retrieval.chunk
    found = await asyncio.to_thread(chunks, read, size)
    text = request.query_params.get("from", "1")
    first = min(int(text), len(found)) if text.isascii() and text.isdigit() and len(text) < 10 else 1
    first = max(1, first)
    shown = []
    for chunk in found[first - 1 : first - 1 + CHUNKS]:
        section = next((s for s in read.sections if s.start <= chunk.begin < s.end), None)
        heading = (
            "" if section is None else f"{section.kind} {section.number}" + (f": {section.title}" if section.title else "")
        )
        said = read.text[chunk.begin : chunk.end]
        length = f"{len(said):,}"
        tokens = words.estimate(max(1, len(said.encode()) // 4))
        shown.append(ShownChunk(chunk.number, heading, chunk.begin, chunk.end, length, tokens, said.strip("\n")))
    at = f"/files/{id}/chunks"
    earlier = address(at, {"from": max(1, first - CHUNKS)}) if first > 1 else None
    later = address(at, {"from": first + CHUNKS}) if first - 1 + CHUNKS < len(found) else None
    embeddings = request.app.state.settings.serving.embeddings
    meanings = "" if embeddings is None else embeddings.remote.model if embeddings.remote is not None else embeddings.base
    page = ChunksPage(id, words.parts(file.filename), size, len(found), meanings, tuple(shown), earlier, later)
    return await show(request, visitor, "chunks.html", "Chunks", page)


async def _page(
    request: Request,
    visitor: Visitor,
    model: str,
    chosen: list[str],
    thread: str = "[]",
    answers: tuple[Answer, ...] = (),
) -> Response:
    models: Models = request.app.state.models
    names = tuple(sorted(listed.name for listed in await asyncio.to_thread(models.listed, visitor.caller)))
    listing = await store_of(request).list(visitor.caller, MOST_FILES)
    known = {file.id for file in listing.files}
    older = await store_of(request).find(
        visitor.caller, [id.replace("\0", "") for id in chosen[:MOST_FILES] if id not in known]
    )
    files = [
        Picked(file.id, words.parts(file.filename), words.kind_of(file.mime_type)[0], file.id in chosen)
        for file in [*older, *listing.files]
        if not file.expired
    ]
    page = ChatPage(names, model, tuple(files), listing.more, thread, answers)
    return await show(request, visitor, "chat.html", "Chat", page)


async def _reply(request: Request, visitor: Visitor, asked: Asked) -> AsyncGenerator[ReplyEvent, None]:
    state = request.app.state
    with state.batches.somebody_waits():
        async with aclosing(answer_of(state.models, state.metrics, visitor.caller, asked.request())) as events:
            async for event in events:
                yield event


async def _answer(request: Request, visitor: Visitor, asked: Asked, hearing: Hearing) -> Answer:
    names = {file.id: file.filename for file in asked.files}
    price = request.app.state.settings.serving.price(asked.model)
    number = len(asked.thread) + 1
    return await hearing.answer(store_of(request), visitor.caller, number, asked.question, names, price)


def _thread(asked: Asked, answer: Answer) -> str:
    said = [(asked.question, answer.text)] if answer.text.strip() else []
    return json.dumps([*asked.thread, *said], ensure_ascii=False)


async def _told(request: Request, visitor: Visitor, asked: Asked) -> AsyncIterator[bytes]:
    """`said`: more of the text; `answer`: the whole, as HTML; `failed`: why there is none."""
    hearing, events = Hearing(), _reply(request, visitor, asked)
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            await asyncio.wait({coming}, timeout=PING_SECONDS)
            if not coming.done():
                yield PING
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                break
            if text := hearing.take(event):
                yield sent({"type": "said", "text": text})
            coming = asyncio.ensure_future(anext(events))
        answer = await _answer(request, visitor, asked, hearing)
        frame = views.Frame("Chat", visitor.session.token, None, "/chat")
        html = views.render("answer.html", frame, answer)
        yield sent({"type": "answer", "html": html, "thread": _thread(asked, answer)})
    except Exception as error:  # the status has been sent
        logs.event("stream_failed", logging.ERROR, error, request_id=request_id_of(request))
        yield sent({"type": "failed", "message": words.sentence(wire.failure(error).message)})
    finally:
        coming.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
            await coming
        await events.aclose()


routes: list[BaseRoute] = [
    Route("/chat", signed_in(chat), methods=["GET"]),
    Route("/chat", signed_in(ask), methods=["POST"]),
    Route("/files/{id:str}/chunks", signed_in(show_chunks), methods=["GET"]),
]
