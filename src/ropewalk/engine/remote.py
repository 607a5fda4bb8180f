"""A conversation in, the reply's blocks out: by another server, which speaks Anthropic's Messages or OpenAI's chat completions.

    request -> documents' text -> its JSON -> HTTP -> its events -> blocks

The same as engine/answer.py does with a model of this machine. Files do not leave as files: the other server sees their text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ropewalk.chat.citations import Citable, wanted
from ropewalk.chat.messages import Ended, MessagesRequest, ReplyEvent, Started, Usage
from ropewalk.chat.signatures import Signatures
from ropewalk.engine import remote_anthropic, remote_openai
from ropewalk.engine.sources import Sources
from ropewalk.engine.upstream import Upstream
from ropewalk.errors import BadInput, UpstreamUnknown
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.vault import derive

END = b"[DONE]"  # how chat completions end; Messages end by an event


class Replies(Protocol):
    """A reply as it is read, in one protocol or the other."""

    @property
    def over(self) -> bool: ...

    def feed(self, event: Mapping[str, Any]) -> list[ReplyEvent]: ...

    def finish(self) -> list[ReplyEvent]: ...


@dataclass(frozen=True)
class RemoteAnswerer:
    """One model of another server."""

    store: Store
    sources: Sources
    upstream: Upstream

    async def count(self, caller: Caller, request: MessagesRequest) -> int:
        """Tokens of the prompt, as the other server counts them; BadInput where it does not."""
        if not self._anthropic:
            raise self._cannot("count_tokens", "which have no such thing")
        citables = await self._read(caller, request)
        asked = remote_anthropic.counted(request, self._model, citables, cites=wanted(request))
        try:
            answer = await self.upstream.ask(remote_anthropic.COUNT_PATH, asked)
        except UpstreamUnknown as error:
            raise BadInput(
                f"count_tokens: '{self.upstream.name}' is answered by another server, and it counts none: {error}"
            ) from None
        count = answer.get("input_tokens")
        if not isinstance(count, int):
            raise self.upstream.failed("told no count of tokens")
        return count

    async def warm(self, caller: Caller, request: MessagesRequest) -> Usage:
        """Has the other server read the documents of a conversation ahead of its first question, where it knows how."""
        if not self._anthropic:
            raise self._cannot("reading ahead", "which have no such thing")
        ahead = replace(request, max_tokens=0, caching=request.caching or "5m")
        citables = await self._read(caller, ahead)
        asked = remote_anthropic.body(ahead, self._model, citables, cites=wanted(ahead))
        answer = await self.upstream.ask(remote_anthropic.PATH, {**asked, "stream": False})
        return remote_anthropic.usage(answer.get("usage"))

    async def stream(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[ReplyEvent, None]:
        """The reply, as it comes; closing the iterator closes the connection to the other server, which ends it there."""
        if not request.max_tokens:  # only to read ahead
            usage = await self.warm(caller, request)
            yield Started(usage)
            yield Ended("max_tokens", None, usage)
            return
        cites = wanted(request)
        if cites and not self._anthropic:
            raise self._cannot("citations", "which have none; ask without citations, or ask another model")
        citables = await self._read(caller, request)
        replies: Replies
        if self._anthropic:
            path, signatures = remote_anthropic.PATH, None  # the other server signs thinking, and checks it
            asked = remote_anthropic.body(request, self._model, citables, cites=cites)
            replies = remote_anthropic.Replies(request, citables if cites else ())
        else:
            path, signatures = remote_openai.PATH, await self._signatures(caller)
            asked = remote_openai.body(request, self._model, self.upstream.remote.url, citables)
            replies = remote_openai.Replies(request)
        async with aclosing(self.upstream.stream(path, asked)) as events:
            async for data in events:
                if data == END:
                    break
                found = self._fed(replies, data)
                for event in signatures.sign(found) if signatures is not None else found:
                    yield event
                if replies.over:
                    return
        found = replies.finish()
        for event in signatures.sign(found) if signatures is not None else found:
            yield event
        if not replies.over:
            raise self.upstream.failed("broke off in the middle of its reply")

    @property
    def _anthropic(self) -> bool:
        return self.upstream.remote.api == "anthropic"

    @property
    def _model(self) -> str:
        return self.upstream.remote.model or self.upstream.name

    async def _read(self, caller: Caller, request: MessagesRequest) -> list[Citable]:
        """What the documents say, in their order."""
        found: list[Citable] = []
        for asked in request.documents():
            read = await self.sources.read(caller, asked.source)
            found.append(Citable(read.document, asked.title, read.file_id, asked.found_at))
        return found

    async def _signatures(self, caller: Caller) -> Signatures:
        async with self.store.database.reading() as connection:
            return Signatures(derive(await workspace_key(connection, self.store.vault, caller.workspace_id), "thinking"))

    def _fed(self, replies: Replies, data: bytes) -> list[ReplyEvent]:
        event = self.upstream.object(data)
        self.upstream.refuse_error(event)
        try:
            return replies.feed(event)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self.upstream.failed("streams what is not of its api; it may be another than models.yml says") from None

    def _cannot(self, what: str, why: str) -> BadInput:
        return BadInput(f"{what}: '{self.upstream.name}' is answered over OpenAI's chat completions, {why}")
