"""A conversation in, the reply's blocks out: by a base or adapter of this machine.

    request -> documents' text -> prompt in pieces -> engine -> text -> blocks

Pieces that come from stored files lie on disk under a key made of those files' own, registered with each of them: deleting a file
erases them, and without its data key they could not be opened anyway.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from pathlib import Path

from ropewalk.chat.citations import Citable, Citables, wanted
from ropewalk.chat.citing import Citing
from ropewalk.chat.framing import framing
from ropewalk.chat.messages import Ended, Excerpt, MessagesRequest, ReplyEvent, Retrieved, Started, Text, Usage
from ropewalk.chat.pictures import unseen
from ropewalk.chat.prompt import Piece, Prompt, Shown, raw_ids, render
from ropewalk.chat.replies import TAIL, form_for, parser_for, stop_ids
from ropewalk.chat.retrieval import Chunk, Index, fitted, joined
from ropewalk.chat.signatures import Signatures
from ropewalk.chat.template import Template
from ropewalk.config.serving import Retrieval
from ropewalk.engine.embedding import Meanings
from ropewalk.engine.pictures import Album
from ropewalk.engine.replying import Plain, Reply
from ropewalk.engine.request import NEVER, Grammar, Keep, Picture, Request, Sampling, Span, acts_from
from ropewalk.engine.sources import Sources
from ropewalk.engine.thinking import bounded, budget_of
from ropewalk.engine.token_engine import TokenEngine
from ropewalk.errors import BadInput
from ropewalk.files.receipts import id_digest
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.models.folder import sees
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.tracing import traced_stream
from ropewalk.vault import derive

FOLDER = "prefixes"  # in the data folder
MOST_REMEMBERED = 100_000
# Shares of a context that are left to the reply: files that would leave less are shown in part, and then leave more.
REPLY_AT_LEAST, REPLY = 16, 4
RAW_BLOCK = 256  # ids of a prompt that no template wrote that are found again together


class Places:
    """Where pieces of prompts lie on disk: each is registered with the files it was read from, and erased with them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._registered: set[tuple[str, Path]] = set()  # so that the database is asked once

    def folder(self, weights: str) -> Path:
        """What was read with these weights; an engine keeps it within its budget."""
        return self._store.settings.data.expanduser().resolve() / FOLDER / weights[:16]

    def path(self, weights: str, name: str) -> Path:
        return self.folder(weights) / name[:2] / name

    async def register(self, file_id: str, path: Path) -> None:
        """Has the path erased with the file; before anything lies there."""
        if (file_id, path) not in self._registered:
            await self._store.register_path(file_id, "kv", path)
            if len(self._registered) >= MOST_REMEMBERED:
                self._registered.clear()
            self._registered.add((file_id, path))

    async def let_go(self, digests: Collection[str] | None = None) -> list[str]:
        """The paths of the files whose ids have these digests, or (None) of all that are no more; they are remembered no longer."""
        ids = {file_id for file_id, _ in self._registered}
        if digests is None:
            ids -= await self._store.existing(sorted(ids))
        else:
            ids = {id for id in ids if id_digest(id) in digests}
        gone = {(file_id, path) for file_id, path in self._registered if file_id in ids}
        self._registered -= gone
        return [str(path) for _, path in gone]


def _spent(event: ReplyEvent) -> dict[str, int | str] | None:
    """What a trace says of a reply: numbers alone."""
    if not isinstance(event, Ended):
        return None
    usage = event.usage
    told: dict[str, int | str] = {
        "gen_ai.usage.output_tokens": usage.output,
        "gen_ai.usage.cache_read_tokens": usage.cache_read,
    }
    read = usage.input + usage.cache_creation + usage.cache_read
    return told | {"gen_ai.usage.input_tokens": read, "gen_ai.response.finish_reason": event.stop_reason}


@dataclass(frozen=True)
class Answerer:
    """One model whose prompts are made here, ready to be asked."""

    store: Store
    sources: Sources
    places: Places | None  # None: nothing that was read lies on this machine
    client: TokenEngine
    template: Template
    weights: str  # names the base's content
    adapter: str | None = None
    adapter_digest: str = ""
    invocation: tuple[int, ...] | None = None  # of an activated adapter
    retrieval: Retrieval = field(default_factory=Retrieval)
    meanings: Meanings | None = None  # where an embeddings model is configured

    async def count(self, caller: Caller, request: MessagesRequest) -> int:
        """Ids of the rendered prompt."""
        return (await self._prompt(caller, request, await self._album(caller, request)))[0].length

    async def warm(self, caller: Caller, request: MessagesRequest) -> Usage:
        """Reads the documents of a conversation ahead of its first question."""
        album = await self._album(caller, request)
        prompt, _, _ = await self._prompt(caller, request, album, whole=True)  # which parts are shown, only a question tells
        if self.meanings is not None and self._too_long(prompt):  # then what is shown of it will be looked for by its vectors
            read = [await self.sources.read(caller, part.source) for part in request.documents()]
            stored = [(found.file_id, found.document) for found in read if found.file_id is not None]
            if stored:
                await self.meanings.prepare(caller, stored, self._chunk)
                return Usage()
        sent = Request(new_id("msg"), await self._spans(caller, prompt), (), 0, self.adapter, scope=caller.workspace_id)
        async with aclosing(self.client.generate(sent, album.pixels)) as events:
            event = await anext(events)
        return prompt.usage(event.created or 0, event.read or 0)

    async def stream(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[ReplyEvent, None]:
        """The reply, as it comes; closing the iterator ends it at once."""
        async with aclosing(self.samples(caller, request)) as events:
            async for _, event in events:
                yield event

    @traced_stream("reply", lambda self, caller, request: {"gen_ai.request.model": request.model}, lambda item: _spent(item[1]))
    async def samples(self, caller: Caller, request: MessagesRequest) -> AsyncGenerator[tuple[int, ReplyEvent], None]:
        """Each sample's reply, as they come; closing the iterator ends them at once."""
        if not request.max_tokens:  # only to read ahead
            usage = await self.warm(caller, request)
            yield 0, Started(usage)
            yield 0, Ended("max_tokens", None, usage)
            return
        signing = derive(await self._own_key(caller), "thinking")
        Signatures(signing).check(request)
        await self.client.start()
        album = await self._album(caller, request)
        prompt, citing, excerpts = await self._prompt(caller, request, album)
        if excerpts:
            yield 0, Retrieved(excerpts)
        grammar = await asyncio.to_thread(self._grammar, request, prompt, citing)
        room = self.client.longest - prompt.length
        if room < 1:
            raise BadInput(
                f"prompt is too long: {prompt.length:,} tokens > {self.client.longest - 1:,} maximum; "
                "leave a document out, or ask about a part of it"
            )
        sent = Request(
            new_id("msg"),
            await self._spans(caller, prompt),
            prompt.tail,
            min(request.max_tokens, room),
            self.adapter,
            Sampling(request.temperature, request.top_p, request.top_k, request.min_p, request.seed),
            stop_ids(self.template),
            grammar,
            samples=request.samples,
            scope=caller.workspace_id,
            logprobs=request.tokens,
            top_logprobs=request.top,
        )
        kept = grammar is not None and grammar.kind == "lark"
        budget = budget_of(self.template, request, self._end(prompt), grammar)
        if budget is not None and (request.samples > 1 or request.tokens):
            raise BadInput(
                "with a budget of thinking a reply is one, and not all its ids are the model's own: several replies, log-probabilities "
                "and ids of tokens are there without thinking, or with the effort 'max', which has no budget"
            )
        assert citing is None or request.samples == 1, "whoever asks for citations asks for one reply"

        def reply() -> Reply:
            signatures = Signatures(signing)
            cited = citing.feed if citing is not None else list[ReplyEvent]
            parser = Plain() if request.raw is not None else parser_for(self.template, request, self._end(prompt), kept=kept)
            passes = lambda found: signatures.sign(cited(found))
            return Reply(self.template, request, parser, passes, cut_short=room < request.max_tokens)

        replies, over = [reply() for _ in range(request.samples)], set[int]()
        cost: Usage | None = None
        async with aclosing(bounded(lambda sent: self.client.generate(sent, album.pixels, over), sent, budget)) as events:
            async for event in events:
                if event.read is not None:
                    begun, cost = cost is not None, prompt.usage(event.created or 0, event.read)
                    if not begun:
                        yield 0, Started(cost, prompt.ids if request.tokens else ())
                if event.sample in over:
                    continue  # a stop sequence has ended it, which the engine hears of only now
                one = replies[event.sample]
                for said in one.feed(event):
                    yield event.sample, said
                if one.over:
                    over.add(event.sample)
                    for said in one.finish(cost or Usage()):
                        yield event.sample, said
                    if len(over) == len(replies):
                        break

    # -- prompts

    async def _album(self, caller: Caller, request: MessagesRequest) -> Album:
        """The pictures of a request, as this model is shown them."""
        images = request.images()
        if not images:
            return Album()
        if not await asyncio.to_thread(sees, self.client.folder):
            raise unseen()
        await self.client.start()
        if self.client.eyes is None:
            raise unseen()
        found = await self.sources.pictures.find(caller, images)
        ids = await self.client.measured([(one.about.width, one.about.height) for one in found])
        return Album.of(found, ids, self.client.eyes.token, self.client.eyes.digest)

    async def _prompt(
        self, caller: Caller, request: MessagesRequest, album: Album, *, whole: bool = False
    ) -> tuple[Prompt, Citing | None, tuple[Excerpt, ...]]:
        """The ids, what reads citations out of the reply, and which files are shown in part, which `whole` leaves out."""
        if request.raw is not None:
            return self._raw(request.raw), None, ()
        cites = wanted(request)
        documents = request.documents()
        read = [await self.sources.read(caller, part.source) for part in documents]
        question = " ".join(
            block.text for turn in request.turns[-2:] if turn.role == "user" for block in turn.blocks if isinstance(block, Text)
        )

        def rendered(parts: Mapping[int, Sequence[Chunk]]) -> tuple[Prompt, Citing | None]:
            habits = framing(self.template.origin)
            citables = Citables(
                [
                    Citable(found.document, d.title, found.file_id, d.found_at, joined(parts[i]) if i in parts else None)
                    for i, (d, found) in enumerate(zip(documents, read, strict=True))
                ],
                divided=cites,
            )
            numbers = cites and habits.numbers
            shown = [Shown(citables.shown(i, numbered=numbers), found.file_id) for i, found in enumerate(read)]
            instruction = citables.instruction if numbers else ""
            prompt = render(self.template, request, shown, instruction, album.pictured, album.token)
            return prompt, Citing(citables, question, marked=numbers, steered=habits.steered) if cites else None

        stored = [(i, found.file_id) for i, found in enumerate(read) if found.file_id is not None]
        prompt, citing = await asyncio.to_thread(rendered, {})  # the ids of a long document take their time
        if whole or not stored or not self._too_long(prompt):
            return prompt, citing, ()
        longest, size = self.client.longest, self._chunk
        nearness = None
        if self.meanings is not None:
            nearness = await self.meanings.nearness(caller, [(id, read[i].document) for i, id in stored], size, question)

        def fitting() -> tuple[Prompt, Citing | None, tuple[Excerpt, ...]]:
            with closing(Index([read[i].document for i, _ in stored], size, nearness)) as index:
                found = fitted(
                    index,
                    question,
                    lambda chosen: rendered({i: own for (i, _), own in zip(stored, chosen, strict=True)}),
                    lambda made: made[0].length,
                    longest - longest // REPLY,
                    self.retrieval.tokens or longest,
                    lambda text: len(self.template.encode_content(text)),
                )
                if found is None:  # it is not the files that are too long
                    return prompt, citing, ()
                made, chosen = found
                counts = zip(stored, chosen, index.chunks, strict=True)
                return *made, tuple(Excerpt(id, len(own), len(of)) for (_, id), own, of in counts)

        return await asyncio.to_thread(fitting)

    def _raw(self, given: str | tuple[int, ...]) -> Prompt:
        """A prompt as it stands, in blocks, so that one which begins alike is not read again."""
        ids = raw_ids(self.template, given)
        body = ids[:-1]
        blocks = [body[begin : begin + RAW_BLOCK] for begin in range(0, len(body), RAW_BLOCK)]
        return Prompt(tuple(Piece(block, (), False) for block in blocks), ids[-1:])

    def _too_long(self, prompt: Prompt) -> bool:
        """Whether it leaves the reply too little; nobody knows before the engine has started."""
        longest = self.client.longest
        return longest > 0 and prompt.length > longest - longest // REPLY_AT_LEAST

    @property
    def _chunk(self) -> int:
        """Characters of a chunk: several fit in the smallest context."""
        return min(self.retrieval.chunk, max(100, self.client.longest // 2))

    async def _spans(self, caller: Caller, prompt: Prompt) -> tuple[Span, ...]:
        """The prompt's pieces, with the place and the key of those that may lie on disk."""
        keys = {id: (await self.store.open_content(caller, id)).key for id in {id for p in prompt.prefix for id in p.files}}
        own = derive(await self._own_key(caller), "prefixes")
        spans: list[Span] = []
        name, position = "", 0
        ids = [id for piece in prompt.prefix for id in piece.ids] + list(prompt.tail)
        acting = acts_from(ids, self.invocation) if self.adapter is not None else NEVER
        for piece in prompt.prefix:
            position += len(piece.ids)
            adapter = self.adapter_digest if position > acting else ""
            parts = [name, self.weights, self.template.digest, adapter, caller.workspace_id, list(piece.ids)]
            shown = piece.picture
            if shown is not None:
                parts.append(shown.digest)
            name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            keep = None
            if piece.kept and self.places is not None:
                sealing = hashlib.sha256(b"".join([own, *(keys[id] for id in piece.files)])).digest()
                path = self.places.path(self.weights, name)
                keep = Keep(str(path), derive(sealing, "segment"))
                for id in dict.fromkeys(piece.files):
                    await self.places.register(id, path)
            picture = Picture(shown.digest, shown.width, shown.height) if shown is not None else None
            spans.append(Span(piece.ids, keep, picture))
        return tuple(spans)

    async def _own_key(self, caller: Caller) -> bytes:
        async with self.store.database.reading() as connection:
            return await workspace_key(connection, self.store.vault, caller.workspace_id)

    def _grammar(self, request: MessagesRequest, prompt: Prompt, citing: Citing | None) -> Grammar | None:
        if request.raw is not None:
            return None
        if citing is not None and citing.form and not request.tools and not request.thinking:
            return Grammar("regex", citing.form)
        form = form_for(self.template, request, self._end(prompt))
        return Grammar(form.kind, form.text, form.after, form.again) if form is not None else None

    def _end(self, prompt: Prompt) -> str:
        return self.template.decode(prompt.tail[-TAIL:], skip_special_tokens=False)
