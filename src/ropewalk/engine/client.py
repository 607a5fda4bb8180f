"""The engine as whoever asks it sees it: an object of the event loop in front of a process of its own. No torch."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ropewalk.engine import child
from ropewalk.engine.lines import EngineSettings, read_event, write_request
from ropewalk.engine.request import FORGOTTEN, Event, Request, Span
from ropewalk.engine.token_engine import Eyes, Pixels
from ropewalk.errors import BadInput, EngineDied, Overloaded

MOST_SIZES = 10_000  # of pictures, whose ids are remembered
HELD_SECONDS = 15.0


class EngineClient:
    """One base, served by a process that starts with the first request."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.longest = settings.longest or 0  # known once it has started
        self.eyes: Eyes | None = None  # likewise
        self.held = ""  # why the process may not be started now
        self._sizes: dict[tuple[int, int], tuple[int, ...]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._streams: dict[str, asyncio.Queue[Event | None]] = {}
        self._numbers = itertools.count()
        self._adapters: dict[str, str] = {}  # name -> folder: what a new process is told first

    @property
    def folder(self) -> Path:
        """The base's."""
        return Path(self.settings.base)

    async def start(self) -> None:
        """Starts the process, if it is not there; raises what keeps it from starting."""
        async with self._starting:
            if self._process is not None and self._process.returncode is None and not self.held:
                return
            if self.held:
                error = Overloaded(self.held)
                error.retry_after = HELD_SECONDS
                raise error
            process, first = await child.start("ropewalk.engine.worker", asdict(self.settings))
            if not first:
                raise EngineDied(f"the engine for {self.settings.base} did not start; its messages are on the error stream")
            ready = json.loads(first)
            if "failed" in ready:
                await process.wait()
                raise child.raised(ready["failed"], ready["message"])
            self.longest, self._process = ready["longest"], process
            self.eyes = Eyes(**ready["sight"]) if "sight" in ready else None
            self._reader = asyncio.create_task(self._read(process))
            for name, folder in self._adapters.items():
                with suppress(BadInput):  # its folder may be gone; the others are not to wait for it
                    await self._call("load_adapter", name=name, folder=folder)

    async def measured(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """What stands for pictures of these sizes in a prompt."""
        if unknown := [size for size in dict.fromkeys(sizes) if size not in self._sizes]:
            told = (await self._call("measure", sizes=unknown))["ids"]
            if len(self._sizes) > MOST_SIZES:
                self._sizes.clear()
            self._sizes |= {size: tuple(ids) for size, ids in zip(unknown, told, strict=True)}
        return [self._sizes[size] for size in sizes]

    async def generate(
        self, request: Request, pixels: Pixels | None = None, over: Iterable[int] = ()
    ) -> AsyncGenerator[Event, None]:
        """What a request brings, as it comes; closing the iterator cancels it at once.

        `pixels` of pictures not seen before; `over`: samples that whoever asks has had enough of, looked at after each event.
        """
        await self.start()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        sent = replace(request, id=f"{request.id} {next(self._numbers)}")  # one who asks again is not who was cancelled
        self._streams[sent.id] = events
        left, told = request.samples, set[int]()
        try:
            while lacking := (await self._call("submit", request=write_request(sent))).get("lacking"):
                assert pixels is not None
                sent = _with_pixels(sent, await pixels(lacking))
            while left:
                event = await events.get()
                if event is None:
                    raise EngineDied("the engine stopped in the middle of this reply; ask again")
                left -= bool(event.finish)
                if event.finish == "error":
                    raise Overloaded(event.error) if event.error == FORGOTTEN else BadInput(event.error)
                told |= {event.sample} if event.finish else set()
                yield replace(event, id=request.id)
                for sample in set(over) - told:
                    told.add(sample)
                    self._send({"do": "cancel", "id": sent.id, "sample": sample})
        finally:
            self._streams.pop(sent.id, None)
            if left:
                with suppress(EngineDied, Overloaded):
                    self._send({"do": "cancel", "id": sent.id})

    async def load_adapter(self, name: str, folder: Path) -> str:
        """Makes an adapter known, now and after a restart of the process -> the digest of its files."""
        await self.start()
        answer = await self._call("load_adapter", name=name, folder=str(folder))
        self._adapters[name] = str(folder)
        return str(answer["digest"])

    async def forget(self, paths: Iterable[str]) -> None:
        """Drops segments that were kept under these paths, and all that were read after them."""
        if self.running:
            await self._call("forget", paths=list(paths))

    async def flush(self) -> None:
        """Returns when all segments are on disk."""
        if self.running:
            await self._call("flush")

    async def stats(self) -> dict[str, Any]:
        """What the prefix store did, and how many requests there are."""
        return await self._call("stats") if self.running else {}

    @property
    def busy(self) -> bool:
        """Whether anything is being answered."""
        return bool(self._streams)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def stop(self) -> None:
        """Ends the process; what it was answering is cut off."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        await child.end(process)
        if self._reader is not None:
            await self._reader

    async def _call(self, do: str, **values: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send({"do": do, "call": number, **values})
            found = await answer
        finally:
            self._answers.pop(number, None)
        if "error" in found:
            raise child.raised(found["error"], found["message"])
        return found

    def _send(self, command: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None or self._process.returncode is not None:
            raise EngineDied("the engine is not running")
        self._process.stdin.write(json.dumps(command, separators=(",", ":")).encode() + b"\n")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            message = json.loads(line)
            if "events" in message:
                for found in message["events"]:
                    event = read_event(found)
                    if event.id in self._streams:
                        self._streams[event.id].put_nowait(event)
            elif (answer := self._answers.get(message["call"])) is not None and not answer.done():
                answer.set_result(message)  # done: whoever asked has just been cancelled, and is still in the table
        await process.wait()
        for events in self._streams.values():
            events.put_nowait(None)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDied("the engine stopped; ask again"))


def _with_pixels(request: Request, pixels: dict[str, bytes]) -> Request:
    def span(found: Span) -> Span:
        if found.picture is None or found.picture.digest not in pixels:
            return found
        return replace(found, picture=replace(found.picture, pixels=pixels[found.picture.digest]))

    return replace(request, prefix=tuple(map(span, request.prefix)))
