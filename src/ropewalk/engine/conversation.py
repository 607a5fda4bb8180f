"""A conversation at the terminal, with files: this machine's engine, its store, and no server."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from pathlib import Path

from ropewalk.chat.messages import (
    Block,
    BlockEnded,
    BlockStarted,
    Delta,
    Document,
    Ended,
    FileId,
    Image,
    MessagesRequest,
    ReplyEvent,
    Text,
    Thinking,
    Turn,
)
from ropewalk.engine.counted import Answers
from ropewalk.engine.models import Models
from ropewalk.errors import NotFound, Overloaded
from ropewalk.files.pictures import is_picture
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller

CHUNK = 1 << 20


async def converse(
    settings: Settings, registry: Registry, name: str, prompt: str | None, files: Iterable[str], max_tokens: int
) -> None:
    """Asks once, or line by line until the input ends; replies are printed as they come, and what they cost on the error stream."""
    store = await Store.open(settings)
    models = Models(store, registry)
    try:
        caller = await store.local_caller()
        shown = [await _shown(store, caller, file) for file in files]
        answerer = await _loaded(models, name)
        first: tuple[Block, ...] = tuple(shown)
        turns: list[Turn] = []
        if prompt is None:
            print("you: ", end="", flush=True)
        for line in [prompt] if prompt is not None else sys.stdin:
            turns.append(Turn("user", (*first, Text(line.rstrip("\n")))))
            first = ()
            if prompt is None:
                print(f"{name}: ", end="", flush=True)
            request = MessagesRequest(name, max_tokens, tuple(turns), temperature=0.0)
            async with aclosing(answerer.stream(caller, request)) as events:
                turns.append(Turn("assistant", await _printed(events, told=bool(shown))))
            if prompt is None:
                print("you: ", end="", flush=True)
        if prompt is None:
            print()
        await models.flush()
    finally:
        await models.close()
        await store.close()


async def _shown(store: Store, caller: Caller, file: str) -> Document | Image:
    """A file as the model is shown it."""
    found = await store.show(caller, await _stored(store, caller, file))
    return Image(FileId(found.id)) if is_picture(found) else Document(FileId(found.id), title=Path(file).name)


async def _stored(store: Store, caller: Caller, file: str) -> str:
    """The id of a file: its own, that of equal bytes under this name, or a new one."""
    path = Path(file)
    if file.startswith("file_") and not path.exists():
        return (await store.show(caller, file)).id
    if not path.is_file():
        raise NotFound(f"there is no file '{file}', and it is no id of the store")

    async def chunks() -> AsyncIterator[bytes]:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk

    stored = await store.put(caller, chunks(), path.name)
    print(f"{path} is stored as {stored.id}; ask again with --file {stored.id}", file=sys.stderr)
    return stored.id


async def _loaded(models: Models, name: str) -> Answers:
    while True:
        try:
            return await models.answerer(name)
        except Overloaded as error:
            print(error, file=sys.stderr)


async def _printed(events: AsyncIterator[ReplyEvent], told: bool) -> tuple[Block, ...]:
    """Prints a reply's text -> its blocks, as the next turn sends them back."""
    blocks: list[Block] = []
    said = ""
    async for event in events:
        match event:
            case BlockStarted(block):
                blocks.append(block)
                said = ""
            case Delta(text):
                said += text
                if isinstance(blocks[-1], Text):
                    print(text, end="", flush=True)
            case BlockEnded(signature):
                blocks[-1] = Thinking(said, signature) if isinstance(blocks[-1], Thinking) else Text(said)
            case Ended(_, _, usage):
                print(flush=True)
                if told:
                    print(
                        f"[{usage.cache_read:,} tokens read before, {usage.cache_creation + usage.input:,} read now, "
                        f"{usage.output:,} written]",
                        file=sys.stderr,
                    )
    return tuple(blocks)
