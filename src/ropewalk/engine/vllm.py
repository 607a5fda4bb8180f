"""A vLLM server in the place of this machine's engine: prompts stay ours, as ids, and so do replies; it writes, and it remembers.

    Request -> /v1/completions, one for each sample -> ids -> Event
    adapter -> a versioned name -> /v1/load_lora_adapter; let go of when no name stands for it any more

A form that begins in the middle of a reply, such as a call of a tool, is another completion: the reply is stopped where the form begins
and goes on under it, and once it is complete it goes on without.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ropewalk.config.serving import Vllm
from ropewalk.engine import vllm_body
from ropewalk.engine.request import Event, Finish, Grammar, Request
from ropewalk.engine.token_engine import Eyes, Pixels
from ropewalk.engine.upstream import Upstream
from ropewalk.engine.vllm_adapters import VllmAdapters
from ropewalk.engine.vllm_body import Written
from ropewalk.errors import BadInput, Overloaded, RateLimited, RopewalkError, UpstreamUnknown

HEALTH_SECONDS = 0.5
END = b"[DONE]"
FORM = "the form of the reply cannot be kept to by the vLLM server, which is to run with --structured-outputs-config.backend guidance"

log = logging.getLogger("ropewalk.engine")


class VllmEngine:
    """One base and its adapters, written with elsewhere."""

    eyes: Eyes | None = None  # ids stand for no pictures there
    held = ""

    def __init__(
        self, folder: Path, options: Vllm, upstream: Upstream, secret: bytes, probe: tuple[str, Sequence[int]]
    ) -> None:
        """`secret`: what its memory of one workspace is told apart from another's by; `probe`: a text, and its ids in the base."""
        self._folder, self._options, self._upstream, self._secret, self._probe = folder, options, upstream, secret, probe
        self.longest = 0
        self.model = options.model
        self._adapters = VllmAdapters(options, upstream)
        self._writing: Counter[str | None] = Counter()

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def busy(self) -> bool:
        return self._writing.total() > 0

    @property
    def running(self) -> bool:
        return self.longest > 0

    async def start(self) -> None:
        """Asks what is served there, and whether it is the same base; raises what keeps it from being asked."""
        found = await self._upstream.get("models")
        listed = [one for one in found.get("data") or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
        names = [one["id"] for one in listed]
        if not listed or (self.model and self.model not in names):
            raise self._upstream.failed(
                f"serves {', '.join(names[:5]) or 'nothing'}, and not '{self.model or self._upstream.name}'"
            )
        one = next(one for one in listed if not self.model or one["id"] == self.model)
        longest = one.get("max_model_len")
        if not isinstance(longest, int):
            raise self._upstream.failed("does not say how long a text may be (max_model_len); is it a vLLM server?")
        self.model = one["id"]
        await self._same_base()
        self.longest = longest

    async def _same_base(self) -> None:
        text, ids = self._probe
        asked = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            there = (await self._upstream.ask("/tokenize", asked)).get("tokens")
        except UpstreamUnknown:
            log.warning("the vLLM server has no /tokenize: whether it serves the base in %s cannot be seen", self._folder)
            return
        if there != list(ids):
            raise self._upstream.failed(
                f"serves '{self.model}', which reads a text as other ids than the base in {self._folder.name}: it is another one"
            )

    async def well(self) -> bool:
        """Whether it answers now, and well."""
        with suppress(RopewalkError, TimeoutError):
            async with asyncio.timeout(HEALTH_SECONDS):
                await self._upstream.ping("/health")
                return True
        return False

    async def measured(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        raise AssertionError("nobody asks where there are no eyes")

    async def generate(
        self, request: Request, pixels: Pixels | None = None, over: Iterable[int] = ()
    ) -> AsyncGenerator[Event, None]:
        """What a request brings, as it comes; closing the iterator breaks it off there too."""
        if not self.running:
            await self.start()
        came: asyncio.Queue[Event | Exception] = asyncio.Queue()

        async def write(sample: int) -> None:
            try:
                async with aclosing(self._sample(request, sample)) as events:
                    async for event in events:
                        came.put_nowait(event)
            except Exception as error:
                came.put_nowait(error)

        self._writing[request.adapter] += 1
        samples = {sample: asyncio.create_task(write(sample)) for sample in range(request.samples)}
        left, told = set(samples), False
        try:
            while left:
                event = await came.get()
                if isinstance(event, Exception):
                    raise event
                if event.sample in left:
                    left -= {event.sample} if event.finish else set()
                    # What was found is told with the first event, and here once more with the last, since the server says it at the end.
                    yield event if told else replace(event, read=event.read or 0, created=0)
                    told = True
                for sample in left & set(over):
                    samples[sample].cancel()
                    left.discard(sample)
        finally:
            for task in samples.values():
                task.cancel()
            await asyncio.gather(*samples.values(), return_exceptions=True)
            self._writing[request.adapter] -= 1
            if request.adapter is not None and not self._writing[request.adapter]:
                await self._adapters.left(request.adapter)

    async def load_adapter(self, name: str, folder: Path) -> str:
        """Has the server read it, under a name that stands for these weights alone."""
        await self._adapters.load(name, folder)
        return name

    async def unload_adapter(self, name: str) -> None:
        """Has the server let go of it, as soon as nothing is written with it any more."""
        await self._adapters.unload(name, busy=self._writing[name] > 0)

    async def forget(self, paths: Iterable[str]) -> None:
        """Nothing that it has read lies at a path of ours."""

    async def flush(self) -> None:
        """Nothing of it lies on our disk."""

    async def stats(self) -> dict[str, Any]:
        return {}

    async def stop(self) -> None:
        """Leaves the server as it was found; what it was writing is cut off by whoever asked for it."""
        if self.running:
            await self._adapters.close()

    # -- one sample

    async def _sample(self, request: Request, sample: int) -> AsyncGenerator[Event, None]:
        ids = [id for span in request.prefix for id in span.ids] + list(request.tail)
        if not request.max_tokens:  # only to be read: it writes one id, which nobody sees
            async with aclosing(
                self._asked(replace(request, max_tokens=1, grammar=None), ids, sample, 1, None, None)
            ) as chunks:
                told = [chunk.cached or 0 async for chunk in chunks]
            yield Event(request.id, 0, finish="length", read=min(max(told), len(ids)), created=0)
            return
        found, left = Form(request.grammar), (request.lengths or [request.max_tokens] * request.samples)[sample]
        cached: int | None = None  # of the first completion: what later ones find there they have put there themselves
        for number in itertools.count():
            last = Written()
            async with aclosing(self._asked(request, ids, sample, left, found.opener, found.held)) as chunks:
                async for chunk in chunks:
                    if chunk.finish:
                        last = chunk
                    elif chunk.ids:
                        ids += chunk.ids
                        left -= len(chunk.ids)
                        found.saw(chunk.ids)
                        yield _event(request, sample, chunk)
            cached = last.cached if number == 0 else cached
            kept, goes_on = found.after(last, request.stop_ids)
            ids += kept.ids
            left -= len(kept.ids)
            if not goes_on or left <= 0:
                finish: Finish = "stop" if last.finish == "stop" and not goes_on else "length"
                event = replace(_event(request, sample, kept), finish=finish)
                yield replace(event, read=self._read(request, cached), created=0) if sample == 0 else event
                return
            if kept.ids:
                yield _event(request, sample, kept)

    def _read(self, request: Request, cached: int | None) -> int:
        """Ids of the prompt's pieces that were found; a server that does not tell has found none."""
        return min(cached or 0, sum(len(span.ids) for span in request.prefix))

    async def _asked(
        self, request: Request, ids: Sequence[int], sample: int, left: int, opener: int | None, held: Grammar | None
    ) -> AsyncGenerator[Written, None]:
        """One completion. Its last chunk comes when the server has said what it cost."""
        model, salt = request.adapter or self.model, self._salt(request.scope)
        asked = vllm_body.body(request, model, ids, salt, sample=sample, left=left, opener=opener, held=held)
        begun = False
        for again in (True, False):
            try:
                async with aclosing(self._chunks(request, asked)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except RateLimited as limited:  # it is the server that has no room, not whoever asked
                error = Overloaded(str(limited))
                error.retry_after = limited.retry_after
                raise error from None
            except BadInput as refused:
                raise BadInput(f"{FORM}: {refused}") from None if held is not None else refused
            except UpstreamUnknown:
                # A server that was started anew knows none of the adapters that it was told of.
                if begun or not again or request.adapter is None or not await self._adapters.restore(request.adapter):
                    raise

    async def _chunks(self, request: Request, asked: vllm_body.JSON) -> AsyncGenerator[Written, None]:
        last: Written | None = None
        async with aclosing(self._upstream.stream(vllm_body.PATH, asked)) as events:
            async for data in events:
                if data == END:
                    break
                event = self._upstream.object(data)
                self._upstream.refuse_error(event)
                try:
                    chunk = vllm_body.read_chunk(event, request)
                except (KeyError, TypeError, ValueError, AttributeError):
                    raise self._upstream.failed(
                        "streams what no vLLM says: expected the ids of what it writes, and the log-probability of each where asked"
                    ) from None
                if last is not None:
                    last = replace(last, cached=chunk.cached)
                elif chunk.finish:
                    last = chunk
                else:
                    yield chunk
        if last is None:
            raise self._upstream.failed("broke off in the middle of its reply")
        yield last

    def _salt(self, scope: str) -> str:
        """What one workspace has had read is found by no other, not even by the time that it takes."""
        return hmac.new(self._secret, scope.encode(), hashlib.sha256).hexdigest() if scope else ""


class Form:
    """What a reply is kept to, and from where on."""

    def __init__(self, grammar: Grammar | None) -> None:
        self._grammar = grammar if grammar is not None and grammar.kind != "without" else None
        self._within = self._grammar is not None and not self._grammar.after
        self._seen: tuple[int, ...] = ()

    @property
    def held(self) -> Grammar | None:
        """The grammar that is in force."""
        return self._grammar if self._within else None

    @property
    def opener(self) -> int | None:
        """The id at which it may come into force."""
        return None if self._grammar is None or self._within else self._grammar.after[-1]

    def saw(self, ids: Sequence[int]) -> None:
        """What was written meanwhile."""
        if self._grammar is not None and not self._within:
            self._seen = (*self._seen, *ids)[-len(self._grammar.after) :]

    def after(self, last: Written, stops: Sequence[int]) -> tuple[Written, bool]:
        """The end of a completion -> what of it belongs to the reply, and whether the reply goes on."""
        grammar = self._grammar
        ended = last.finish == "stop" and last.ids
        own = ended and last.stopped_at is None and last.ids[-1] not in stops  # the tokenizer's end, which says nothing
        if grammar is None or not ended:
            return (_less(last) if own else last), False
        if self._within:
            if not grammar.again:
                return (_less(last) if own else last), False
            self._within, self._seen = False, ()
            return _less(last), True
        self.saw(last.ids)
        if last.ids[-1] in stops or last.ids[-1] != grammar.after[-1]:
            return (_less(last) if own else last), False
        self._within = self._seen == grammar.after
        return last, True


def _event(request: Request, sample: int, written: Written) -> Event:
    return Event(request.id, sample, written.ids, written.logprobs, top=written.top)


def _less(written: Written) -> Written:
    """Without its last id."""
    return replace(written, ids=written.ids[:-1], logprobs=written.logprobs[:-1], top=written.top[:-1])
