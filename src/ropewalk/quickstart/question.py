"""The last leg: a document is uploaded, and two questions are asked about it; the second reads nothing twice.

file -> Models -> Answerer -> engine process -> text blocks with citations
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.chat.messages import (
    BlockStarted,
    CitationAdded,
    Cited,
    Delta,
    Document,
    Ended,
    FileId,
    MessagesRequest,
    Text,
    Turn,
    Usage,
)
from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.engine.counted import Answers
from ropewalk.engine.models import Models
from ropewalk.files.store import Store
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller

MAX_TOKENS = 48


@dataclass(frozen=True)
class Told:
    """One answer about a file."""

    question: str
    answer: str
    cited: tuple[Cited, ...]
    usage: Usage
    seconds: float  # to the first token

    def stands_in(self, text: str) -> bool:
        """Whether something is cited, and all of it stands at its offsets in the file's text."""
        return bool(self.cited) and all(text[c.start : c.end] == c.text for c in self.cited)


@dataclass(frozen=True)
class Dialogue:
    """Questions about one file."""

    text: str  # of the file
    told: tuple[Told, ...]

    def as_dict(self) -> dict[str, Any]:
        """What the second cost, beside the first."""
        first, second = self.told
        return {
            "cache_read_input_tokens": second.usage.cache_read,
            "input_tokens": second.usage.input,
            "ttft_ratio": round(first.seconds / second.seconds, 2),
            "citation_ok": all(told.stands_in(self.text) for told in self.told),
        }


def about(
    registry: Registry, name: str, file_id: str, questions: Sequence[str]
) -> Callable[[Store, Caller], Awaitable[Dialogue]]:
    """What `LocalFiles.run` does to have these questions answered by the model of this name."""

    async def work(store: Store, caller: Caller) -> Dialogue:
        content = await store.open_content(caller, file_id)
        text = b"".join([chunk async for chunk in content.chunks()]).decode()
        models = Models(store, registry, Serving(engine=EngineOptions(memory_gb=0.25, disk_gb=1)))
        try:
            answerer = await models.answerer(name)
            # Not part of what is compared: starting the engine, and reading the file's text out of its format.
            await _ask(answerer, caller, MessagesRequest(name, 1, (Turn("user", (Text("Hello"),)),), temperature=0))
            requests = [_request(name, file_id, question) for question in questions]
            await answerer.count(caller, requests[0])
            return Dialogue(text, tuple([await _ask(answerer, caller, request) for request in requests]))
        finally:
            await models.close()

    return work


def _request(name: str, file_id: str, question: str) -> MessagesRequest:
    blocks = (Document(FileId(file_id), citations=True), Text(question))
    return MessagesRequest(name, MAX_TOKENS, (Turn("user", blocks),), temperature=0)


async def _ask(answerer: Answers, caller: Caller, request: MessagesRequest) -> Told:
    asked = request.turns[-1].blocks[-1]
    assert isinstance(asked, Text)
    began, first = time.monotonic(), None
    answer, cited, usage = "", list[Cited](), Usage()
    async for event in answerer.stream(caller, request):
        match event:
            case Delta(text):
                answer += text
            case CitationAdded(citation):
                cited.append(citation)
            case Ended():
                usage = event.usage
        if first is None and isinstance(event, BlockStarted | Ended):
            first = time.monotonic() - began
    assert first is not None
    return Told(asked.text, answer, tuple(cited), usage, first)
