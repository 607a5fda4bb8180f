"""A model that another thread of this process lets write, as coroutines ask for it: requests wait in one bounded queue.

HTTP thread: write -> queue -> admit: the thread that drives the generator -> take -> back to whoever asked

Nothing of the generator is touched but in the thread that drives it, so that it needs no locks.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeVar

from ropewalk.engine.replying import Stops
from ropewalk.engine.request import Sampling
from ropewalk.errors import EngineDied, Overloaded

_numbers = count()  # of those that live in this process
IDLE_SECONDS = 0.05


class Written(Protocol):
    """What was written behind some ids."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Sequence[float]: ...

    @property
    def versions(self) -> Sequence[int]:
        """Of the adapter that sampled each id."""

    @property
    def ended(self) -> bool:
        """By itself, rather than by a limit."""


Of = TypeVar("Of", bound=Written)


@dataclass(frozen=True)
class Asked:
    """Ids to go on from, and how."""

    ids: Sequence[int]
    samples: int
    max_tokens: int
    sampling: Sampling
    stop_ids: Sequence[int]
    stops: Stops | None = None  # texts at which a sample ends as well
    ends: Sequence[int] = ()  # where the ids are cut: up to there they may have been read before


class Writes(Protocol):
    """What this needs of a generator while it submits."""

    def submit(
        self,
        key: str,
        ids: Sequence[int],
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        ends: Sequence[int],
        stops: Stops | None,
    ) -> None: ...

    def cancel(self, key: str) -> None: ...


class Steps(Writes, Protocol[Of]):
    """What it needs of one that it drives itself."""

    @property
    def busy(self) -> bool: ...

    def step(self) -> list[tuple[str, int, Of]]: ...


@dataclass(eq=False)
class _Waiting:
    key: str
    asked: Asked
    missing: int  # samples
    loop: asyncio.AbstractEventLoop
    coming: asyncio.Queue[tuple[int, Written] | BaseException] = field(default_factory=asyncio.Queue)  # `samples` at most
    left: bool = False  # whoever asked has gone

    def tell(self, found: tuple[int, Written] | BaseException) -> None:
        """From any thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.coming.put_nowait, found)


class LivePolicy:
    """What is asked of a model under training, beside the training."""

    def __init__(self, *, waiting: int = 256, wake: Callable[[], None] = lambda: None) -> None:
        """`waiting`: the most requests that are not answered yet; `wake` is told, in the HTTP thread, that one has come."""
        self.own = f"endpoint {next(_numbers)}."  # begins the keys of what was asked for here
        self._most, self._wake = waiting, wake
        self._new: queue.Queue[_Waiting] = queue.Queue(waiting)
        self._gone: deque[str] = deque()
        self._under_way: dict[str, _Waiting] = {}  # touched by the driving thread alone
        self._unanswered = 0  # touched by the HTTP thread alone
        self._numbers = count()
        self._closed = False

    # -- the thread that drives the generator

    @property
    def waits(self) -> bool:
        """Whether `admit` would do anything."""
        return bool(self._gone) or not self._new.empty()

    def admit(self, generator: Writes) -> None:
        """Submits what was asked for meanwhile, and cancels what nobody waits for any more."""
        while self._gone:
            key = self._gone.popleft()
            if self._under_way.pop(key, None) is not None:
                generator.cancel(key)
        while True:
            try:
                waiting = self._new.get_nowait()
            except queue.Empty:
                return
            if waiting.left:
                continue
            asked = waiting.asked
            try:
                generator.submit(
                    waiting.key,
                    asked.ids,
                    samples=asked.samples,
                    max_tokens=asked.max_tokens,
                    sampling=asked.sampling,
                    stop_ids=asked.stop_ids,
                    ends=asked.ends,
                    stops=asked.stops,
                )
            except Exception as error:  # it is theirs who asked
                waiting.tell(error)
            else:
                self._under_way[waiting.key] = waiting

    def take(self, finished: Iterable[tuple[str, int, Of]]) -> list[tuple[str, int, Of]]:
        """Gives what was written here to whoever asked; what is others' comes back."""
        others = []
        for key, sample, written in finished:
            if not key.startswith(self.own):
                others.append((key, sample, written))
            elif (waiting := self._under_way.get(key)) is not None:
                waiting.tell((sample, written))
                waiting.missing -= 1
                if not waiting.missing:
                    del self._under_way[key]
        return others

    def drive(self, generator: Steps[Of], stopped: threading.Event) -> None:
        """Lets a generator write for nobody else, until it is stopped."""
        while not stopped.is_set():
            self.admit(generator)
            if generator.busy:
                self.take(generator.step())
            else:
                stopped.wait(IDLE_SECONDS)
        self.close()

    def close(self) -> None:
        """Nothing more will be written: whoever waits is told."""
        self._closed = True
        left = list(self._under_way.values())
        self._under_way.clear()
        while not self._new.empty():
            left.append(self._new.get_nowait())
        for waiting in left:
            waiting.tell(_ended())

    # -- the thread of the HTTP server

    async def write(self, asked: Asked) -> AsyncGenerator[tuple[int, Written], None]:
        """Each sample once it is whole; closing the iterator ends them all."""
        if self._closed:
            raise _ended()
        if self._unanswered >= self._most:
            raise Overloaded(f"{self._unanswered} requests wait already, and {self._most} is the most; try again shortly")
        waiting = _Waiting(f"{self.own}{next(self._numbers)}", asked, asked.samples, asyncio.get_running_loop())
        self._unanswered += 1
        left = asked.samples
        try:
            self._new.put_nowait(waiting)  # there is room: no more are unanswered than it holds
            self._wake()
            while left:
                found = await waiting.coming.get()
                if isinstance(found, BaseException):
                    left = 0
                    raise found
                left -= 1
                yield found
        finally:
            self._unanswered -= 1
            if left:
                waiting.left = True
                self._gone.append(waiting.key)
                self._wake()


def _ended() -> EngineDied:
    return EngineDied("the run whose model this was has ended")
