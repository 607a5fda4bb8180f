"""A conversation in, the reply's blocks out: by another server, which speaks Anthropic's Messages or OpenAI's chat completions.

    request -> documents' text -> its JSON -> HTTP -> its events -> blocks

The same as engine/answer.py does with a model of this machine. The other server sees the text of files, or copies of them that lie
there (remote_files.py), as models.yml says.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ropewalk.chat.citations import Citable, wanted
from ropewalk.chat.messages import UNBOUNDED, Ended, MessagesRequest, ReplyEvent, Started, Usage
from ropewalk.chat.signatures import Signatures
from ropewalk.engine import remote_anthropic, remote_openai
from ropewalk.engine.remote_files import RemoteFiles
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
    files: RemoteFiles
    seen: set[str] = field(default_factory=set)  # what is known of the other server

    async def count(self, caller: Caller, request: MessagesRequest) -> int:
        """Tokens of the prompt, as the other server counts them; BadInput where it does not."""
        if not self._anthropic:
            raise self._cannot("count_tokens", "which have no such thing")
        citables = await self._read(caller, request)
        copies = await self.files.copies(caller, self.upstream, citables)
        asked = remote_anthropic.counted(request, self._model, citables, copies, cites=wanted(request))
        try:
            return await self._counted(asked)
        except UpstreamUnknown as error:
            raise BadInput(
                f"count_tokens: '{self.upstream.name}' is answered by another server, and it counts none: {error}"
            ) from None

    async def warm(self, caller: Caller, request: MessagesRequest) -> Usage:
        """Has the other server read the documents of a conversation ahead of its first question, where it knows how."""
        if not self._anthropic:
            raise self._cannot("reading ahead", "which have no such thing")
        ahead = replace(request, max_tokens=0, caching=request.caching or "5m")
        citables = await self._read(caller, ahead)
        copies = await self.files.copies(caller, self.upstream, citables)
        asked = remote_anthropic.body(ahead, self._model, citables, copies, cites=wanted(ahead))
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
        if not self._anthropic:
            asked = remote_openai.body(request, self._model, self.upstream.remote.url, citables)
            signatures, replies = await self._signatures(caller), remote_openai.Replies(request)
            async with aclosing(self._replied(remote_openai.PATH, asked, replies)) as events:
                async for event in events:
                    for signed in signatures.sign([event]):
                        yield signed
            return
        copies = await self.files.copies(caller, self.upstream, citables)
        if cites or copies:
            await self._must_read_documents()
        try:
            async with aclosing(self._messages(request, citables, copies)) as events:
                async for event in events:
                    yield event
        except (BadInput, UpstreamUnknown) as error:
            lost = {file: copy for file, copy in copies.items() if copy in str(error)}
            if not lost:
                raise
            # Somebody has deleted the copy there. The request was refused, so nothing of the reply has gone out.
            await self.files.forget(self.upstream, lost)
            copies = await self.files.copies(caller, self.upstream, citables)
            async with aclosing(self._messages(request, citables, copies)) as events:
                async for event in events:
                    yield event

    async def samples(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[tuple[int, ReplyEvent], None]:
        """The reply as sample 0; BadInput for what only a model of this machine can be asked."""
        only_here = {
            "n": request.samples > 1,
            "logprobs or return_token_ids": request.tokens,
            "completions of prompts as they stand": request.raw is not None,
            "seed": self._anthropic and request.seed is not None,
            "min_p": self._anthropic and bool(request.min_p),
        }
        if refused := [name for name, asked in only_here.items() if asked]:
            raise BadInput(f"{refused[0]}: '{self.upstream.name}' is answered by another server, which is not asked for that")
        if self._anthropic and request.max_tokens >= UNBOUNDED:
            raise BadInput(f"max_tokens: '{self.upstream.name}' is answered by another server, which needs to be told how many")
        async with aclosing(self.stream(caller, request)) as events:
            async for event in events:
                yield 0, event

    async def _messages(
        self, request: MessagesRequest, citables: Sequence[Citable], copies: Mapping[str, str]
    ) -> AsyncGenerator[ReplyEvent, None]:
        cites = wanted(request)
        asked = remote_anthropic.body(request, self._model, citables, copies, cites=cites)
        replies = remote_anthropic.Replies(request, citables if cites else ())
        # Thinking is signed by the other server, which checks it.
        async with aclosing(self._replied(remote_anthropic.PATH, asked, replies)) as events:
            async for event in events:
                yield event

    async def _replied(self, path: str, asked: Mapping[str, Any], replies: Replies) -> AsyncGenerator[ReplyEvent, None]:
        async with aclosing(self.upstream.stream(path, asked)) as events:
            async for data in events:
                if data == END:
                    break
                for event in self._fed(replies, data):
                    yield event
                if replies.over:
                    return
        for event in replies.finish():
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

    async def _must_read_documents(self) -> None:
        """Raises where the other server leaves documents out of prompts without a word; asked once, by counting one."""
        if "documents" in self.seen:
            return
        with suppress(
            UpstreamUnknown, BadInput
        ):  # it does not count, or refuses documents, which the question itself will tell
            without, with_one = [await self._counted(asked) for asked in remote_anthropic.probes(self._model)]
            if with_one <= without:
                raise self.upstream.failed(
                    "leaves documents out of its prompts, so that it can neither cite them nor read their copies; "
                    "ask without citations, or set files: inline"
                )
        self.seen.add("documents")

    async def _counted(self, asked: Mapping[str, Any]) -> int:
        count = (await self.upstream.ask(remote_anthropic.COUNT_PATH, asked)).get("input_tokens")
        if not isinstance(count, int):
            raise self.upstream.failed("told no count of tokens")
        return count

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
