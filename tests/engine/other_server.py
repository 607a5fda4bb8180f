"""A server that says what a test tells it to, in Anthropic's Messages or OpenAI's chat completions, and keeps what it was asked."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ropewalk.server.node import Node
from ropewalk.server.wire_messages import read_request


@dataclass
class Answer:
    """What the other server says to one request."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 1 << 20  # bytes that are sent at once
    endless: bool = False
    silence: float = 0.0  # seconds, after the first line


@dataclass
class Other:
    """The other server: what it is to say, and what it was asked."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    files: dict[str, tuple[str, str, bytes]] = field(default_factory=dict)  # id -> name, type, bytes
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    uploads: int = 0
    left: threading.Event = field(default_factory=threading.Event)

    def says(self, *answers: Answer) -> None:
        self.answers[:] = answers
        self.asked.clear()
        self.left.clear()

    @property
    def body(self) -> Any:
        return self.asked[-1][2]

    async def answer(self, request: Request) -> Response:
        if request.url.path.startswith("/v1/files"):
            return await self.file(request)
        self.asked.append((request.url.path, dict(request.headers), await request.json()))
        if "messages" in request.url.path:  # what we send, our own server understands
            read_request(Node(self.body), request.headers["anthropic-version"], counting="count" in request.url.path)
        answer = self.answers.pop(0)
        if answer.status != 200:
            return Response(answer.body, answer.status, answer.headers)
        return StreamingResponse(self.pieces(answer), 200, {"content-type": "text/event-stream", **answer.headers})

    async def file(self, request: Request) -> Response:
        """Uploads and deletions, as the Files API answers them; without a word of it in `asked`."""
        if self.answers and request.url.path in self.answers[0].headers.get("only", ""):
            answer = self.answers.pop(0)
            return Response(answer.body, answer.status)
        if request.method == "DELETE":
            id = request.url.path.rpartition("/")[2]
            if self.files.pop(id, None) is None:
                error = {"type": "error", "error": {"type": "not_found_error", "message": f"File not found: {id}"}}
                return JSONResponse(error, 404)
            return JSONResponse({"id": id, "type": "file_deleted"})
        async with request.form() as form:
            sent = form["file"]
            assert isinstance(sent, UploadFile)
            self.uploads += 1
            id = f"file_there{self.uploads}"
            self.files[id] = (sent.filename or "", sent.content_type or "", await sent.read())
        return JSONResponse({"id": id, "type": "file", "filename": sent.filename})

    async def pieces(self, answer: Answer) -> Any:
        try:
            for begin in range(0, len(answer.body), answer.cut):
                yield answer.body[begin : begin + answer.cut]
                if answer.cut < 1 << 20:
                    await asyncio.sleep(0)
            if answer.silence:
                yield b": hello\n\n"
                await asyncio.sleep(answer.silence)
            while answer.endless:
                await asyncio.sleep(0.01)
                yield b": still here\n\n"
        finally:
            self.left.set()


@contextmanager
def listening() -> Iterator[Other]:
    other = Other()
    app = Starlette(routes=[Route("/{path:path}", other.answer, methods=["POST", "DELETE"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        other.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield other
    finally:
        server.should_exit = True
        thread.join()


def event(kind: str, **rest: Any) -> bytes:
    return f"event: {kind}\r\ndata: {json.dumps({'type': kind, **rest}, ensure_ascii=False)}\r\n\r\n".encode()


def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> bytes:
    begun = event("content_block_start", index=index, content_block=content)
    said = b"".join(event("content_block_delta", index=index, delta=delta) for delta in deltas)
    return begun + said + event("content_block_stop", index=index)


def said(text: str) -> bytes:
    return block(0, {"type": "text", "text": ""}, *({"type": "text_delta", "text": word} for word in text.split("|")))


def message(*blocks: bytes, reason: str = "end_turn", stop: str | None = None) -> bytes:
    before = {"input_tokens": 5, "cache_creation_input_tokens": 7, "cache_read_input_tokens": 11, "output_tokens": 1}
    begun = event("message_start", message={"id": "msg_x", "content": [], "usage": before}) + event("ping")
    delta = {"stop_reason": reason, "stop_sequence": stop}
    ended = event("message_delta", delta=delta, usage={"output_tokens": 23}) + event("message_stop")
    return begun + b"".join(blocks) + ended


def chunks(*deltas: dict[str, Any], reason: str = "stop", usage: dict[str, Any] | None = None, **ended: Any) -> bytes:
    found = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    found.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason, **ended}]})
    found += [{"choices": [], "usage": usage}] if usage else []
    lines = [json.dumps({"id": "c", "object": "chat.completion.chunk", **chunk}, ensure_ascii=False) for chunk in found]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


def asked(model: str, content: Any = "Hello", **rest: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 2000, "messages": [{"role": "user", "content": content}], **rest}


def paper(text: str, **rest: Any) -> dict[str, Any]:
    return {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": text}, **rest}
