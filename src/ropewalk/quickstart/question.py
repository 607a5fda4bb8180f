"""Questions to a published model: many by themselves, or some about a file, of which all but the first read nothing twice.

name -> Models -> Answerer -> engine process -> text, with citations where there is a file
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from ropewalk.chat.messages import (
    Block,
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
from ropewalk.engine.models import Models
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller

MAX_TOKENS = 48
T = TypeVar("T")


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


class Asking:
    """The published models, ready to be asked; an engine that was started for one question stays for the next."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._runner, self._exits = registry, asyncio.Runner(), AsyncExitStack()

    def __enter__(self) -> Asking:
        self._runner.run(self._open())
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.run(self._exits.aclose())
        self._runner.close()

    async def _open(self) -> None:
        self._store = await Store.open(Settings())
        self._exits.push_async_callback(self._store.close)
        self._caller = await self._store.local_caller()
        options = EngineOptions(memory_gb=0.25, disk_gb=1, dtype="float32")  # the same answers on every machine
        self._models = Models(self._store, self._registry, Serving(engine=options))
        self._exits.push_async_callback(self._models.close)

    def run(self, work: Callable[[Store, Models, Caller], Coroutine[Any, Any, T]]) -> T:
        """Does other work with the same store and models."""
        return self._runner.run(work(self._store, self._models, self._caller))

    def answers(self, name: str, questions: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[str]:
        """What the model of this name says to each of these questions, asked side by side."""
        return self._runner.run(self._answers(name, questions, max_tokens))

    async def _answers(self, name: str, questions: Sequence[str], max_tokens: int) -> list[str]:
        asked = [MessagesRequest(name, max_tokens, _user(Text(question)), temperature=0) for question in questions]
        return [told.answer.strip() for told in await asyncio.gather(*map(self._ask, asked))]

    def about(self, name: str, file_id: str, questions: Sequence[str]) -> Dialogue:
        """Questions about a stored file, one after the other."""
        return self._runner.run(self._about(name, file_id, questions))

    async def _about(self, name: str, file_id: str, questions: Sequence[str]) -> Dialogue:
        content = await self._store.open_content(self._caller, file_id)
        text = b"".join([chunk async for chunk in content.chunks()]).decode()
        # Not part of what is compared: the engine's start, and reading the file's text out of its format.
        await self._answers(name, ["Hello"], 1)
        file = Document(FileId(file_id), citations=True)
        asked = [MessagesRequest(name, MAX_TOKENS, _user(file, Text(question)), temperature=0) for question in questions]
        await (await self._models.answerer(name)).count(self._caller, asked[0])
        return Dialogue(text, tuple([await self._ask(request) for request in asked]))

    async def _ask(self, request: MessagesRequest) -> Told:
        asked = request.turns[-1].blocks[-1]
        assert isinstance(asked, Text)
        answerer = await self._models.answerer(request.model)
        began, first = time.monotonic(), None
        answer, cited, usage = "", list[Cited](), Usage()
        async for event in answerer.stream(self._caller, request):
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


def _user(*blocks: Block) -> tuple[Turn, ...]:
    return (Turn("user", blocks),)
