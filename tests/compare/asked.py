"""Models whose answers a test decides, behind the seam at which real ones answer; all they are asked is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from ropewalk.chat.messages import (
    BlockEnded,
    BlockStarted,
    Delta,
    Ended,
    MessagesRequest,
    ReplyEvent,
    Started,
    Text,
    Usage,
)
from ropewalk.compare.candidates import Candidate, add_candidate
from ropewalk.compare.session import WARM_UP
from ropewalk.config.serving import Remote, ServedModel, Serving
from ropewalk.engine.counted import Answers
from ropewalk.engine.models import Models
from ropewalk.files.store import Store
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.prices import Price

Says = Callable[[str], str]  # a question's last text -> the answer; raises what the model would


@dataclass
class FakeModels(Models):
    """Served models that are functions."""

    says: dict[str, Says] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # (name, question), warm-ups left out
    at_once: int = 0
    most_at_once: int = 0

    @classmethod
    def of(cls, store: Store, folder: Any, families: dict[str, str] | None = None, **says: Says) -> FakeModels:
        found = cls(says=dict(says))
        served = {
            name: ServedModel(
                remote=Remote("openai", f"http://127.0.0.1:1/{name}", (families or {}).get(name, name)),
                price=Price(1.0, 2.0, 0.5, as_of="2026-11-22"),
            )
            for name in says
        }
        Models.__init__(found, store, Registry(folder), Serving(models=served))
        return found

    async def answerer(self, name: str, *, loaded: bool = True) -> Answers:
        return FakeAnswers(self, name)


@dataclass
class FakeAnswers:
    """One of them."""

    models: FakeModels
    name: str

    async def count(self, caller: Caller, request: MessagesRequest) -> int:
        return 1

    async def warm(self, caller: Caller, request: MessagesRequest) -> Usage:
        return Usage()

    async def stream(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[ReplyEvent, None]:
        question = "".join(block.text for block in request.turns[-1].blocks if isinstance(block, Text))
        if question != WARM_UP:
            self.models.asked.append((self.name, question))
        self.models.at_once += 1
        self.models.most_at_once = max(self.models.most_at_once, self.models.at_once)
        try:
            await asyncio.sleep(0)
            text = "yes" if question == WARM_UP else self.models.says[self.name](question)
        finally:
            self.models.at_once -= 1
        yield Started(Usage(input=10))
        yield BlockStarted(Text(""))
        yield Delta(text)
        yield BlockEnded()
        yield Ended("end_turn", None, Usage(input=10, output=5))


async def candidates(store: Store, models: Models, caller: Caller, *names: str) -> list[Candidate]:
    """Served models as candidates."""
    return [await add_candidate(store, models, caller, name) for name in names]


def preferring(choose: Callable[[str, str], str], reason: str = "it is better", quotes: tuple[str, ...] = ()) -> Says:
    """A judge: two answers -> first, second or same."""

    def says(question: str) -> str:
        parts = {}
        for name in ("first", "second"):
            begin = question.index(f"<{name} ")
            inner = question[question.index(">\n", begin) + 2 :]
            parts[name] = inner[: inner.index(f"\n</{name} ")]
        preference = choose(parts["first"], parts["second"])
        return json.dumps({"reason": reason, "quotes": list(quotes), "preference": preference})

    return says
