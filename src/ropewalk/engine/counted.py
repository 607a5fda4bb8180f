"""Whoever answers, and the ledger beside: what each question cost is written down, also where its reply was cut off."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from ropewalk.chat.messages import Ended, MessagesRequest, ReplyEvent, Started, Usage
from ropewalk.files.token_ledger import FileTokens, Spent, TokenLedger
from ropewalk.tenants.caller import Caller


class Answers(Protocol):
    """Whoever answers: an engine of this machine, or another server."""

    async def count(self, caller: Caller, request: MessagesRequest) -> int: ...

    async def warm(self, caller: Caller, request: MessagesRequest) -> Usage: ...

    def stream(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[ReplyEvent, None]: ...

    def samples(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[tuple[int, ReplyEvent], None]: ...


@dataclass(frozen=True)
class Counted:
    """Answers as `answers` does, under a name."""

    name: str
    answers: Answers
    ledger: TokenLedger

    async def count(self, caller: Caller, request: MessagesRequest) -> int:
        """Ids of the rendered prompt; costs nothing."""
        return await self.answers.count(caller, request)

    async def warm(self, caller: Caller, request: MessagesRequest) -> Usage:
        """Reads the documents of a conversation ahead of its first question."""
        usage = await self.answers.warm(caller, request)
        self._add(caller, request, usage, asked=False)
        return usage

    async def stream(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[ReplyEvent, None]:
        """The reply, as it comes; closing the iterator ends it at once."""
        usage: Usage | None = None
        try:
            async with aclosing(self.answers.stream(caller, request)) as events:
                async for event in events:
                    if isinstance(event, Started | Ended):
                        usage = event.usage
                    yield event
        finally:
            if usage is not None:
                self._add(caller, request, usage, asked=request.max_tokens > 0)

    async def samples(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[tuple[int, ReplyEvent], None]:
        """Each sample's reply, as they come; the prompt is counted once."""
        usage: Usage | None = None
        written = 0
        try:
            async with aclosing(self.answers.samples(caller, request)) as events:
                async for sample, event in events:
                    if isinstance(event, Started | Ended):
                        usage = event.usage
                        written += usage.output
                    yield sample, event
        finally:
            if usage is not None:
                self._add(caller, request, replace(usage, output=written), asked=request.max_tokens > 0)

    def _add(self, caller: Caller, request: MessagesRequest, usage: Usage, *, asked: bool) -> None:
        spent = Spent(usage.input, usage.cache_creation, usage.cache_read, usage.output)
        shares = {share.file_id: share for share in usage.files}
        of_files = {
            id: FileTokens(int(asked), shares[id].cache_creation, shares[id].cache_read)
            if id in shares
            else FileTokens(int(asked))
            for id in request.files()
        }
        self.ledger.add(caller, self.name, spent, of_files)
