"""The worker that answers batches: in every server process, a few requests at a time, and fewer while somebody waits for an answer.

What a process that died was working on is taken up when its lease has run out; what one that ends well was working on, at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ropewalk.batches.ledger import Item, Ledger, Outcome
from ropewalk.errors import EngineDied, Overloaded
from ropewalk.server import logs

POLL_SECONDS = 5.0  # another process may have taken in a batch, or have died
WHILE_OTHERS_WAIT = 1  # requests of batches beside those of people
MOST_TRIES = 3  # a request that ends its process so often is not tried again
LEAST_PAUSE = 0.2

Answer = Callable[[Item], Awaitable[Mapping[str, Any]]]
Failed = Callable[[BaseException], Mapping[str, Any]]


class BatchRunner:
    """One process's part in all batches. `answer` makes a result of a request, `failed` one of an error."""

    def __init__(self, ledger: Ledger, answer: Answer, failed: Failed, at_once: int) -> None:
        self.ledger, self.at_once = ledger, at_once
        self._answer, self._failed = answer, failed
        self._waiting = 0  # people
        self._working: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._settled_at = self._paused_until = 0.0

    @contextmanager
    def somebody_waits(self) -> Iterator[None]:
        """While the block runs, somebody waits for an answer that is not a batch's."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def look(self) -> None:
        """A batch has come, or was cancelled."""
        self._settled_at = 0.0
        self.wake()

    async def run(self) -> None:
        """Works until it is cancelled; what it then was working on is given back."""
        renewing = asyncio.create_task(self._renew())
        try:
            while True:
                self._wake.clear()
                found = False
                try:
                    found = await self._round()
                except Exception as error:  # the database is busy, or gone for a moment: the next round tries again
                    logs.event("batches_failed", logging.ERROR, error)
                if not found:
                    await self._rest()
        finally:
            renewing.cancel()
            for task in self._working:
                task.cancel()
            await asyncio.gather(renewing, *self._working, return_exceptions=True)

    async def _round(self) -> bool:
        """Takes up what there is room for; whether there may be more."""
        if time.monotonic() >= self._settled_at + POLL_SECONDS:
            self._settled_at = time.monotonic()
            await self.ledger.settle()
        room = (WHILE_OTHERS_WAIT if self._waiting else self.at_once) - len(self._working)
        if room <= 0 or time.monotonic() < self._paused_until:
            return False
        items = await self.ledger.claim(room)
        for item in items:
            task = asyncio.create_task(self._work(item))
            self._working.add(task)
            task.add_done_callback(self._done)
        return bool(items)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        self.wake()
        if not task.cancelled() and (error := task.exception()) is not None:  # its lease runs out, and it is tried again
            logs.event("batches_failed", logging.ERROR, error)

    async def _rest(self) -> None:
        pause = self._paused_until - time.monotonic()
        if pause > 0:
            await asyncio.sleep(min(pause, POLL_SECONDS))
            return
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self.ledger.lease / 4_000_000)
            if self._working:
                try:
                    await self.ledger.renew()
                except Exception as error:  # in time the next will do
                    logs.event("batches_failed", logging.ERROR, error)

    async def _work(self, item: Item) -> None:
        outcome: Outcome = "errored"
        try:
            if item.tries > MOST_TRIES:
                raise RuntimeError(f"given up after {MOST_TRIES} tries, of which none came to an end")
            result, outcome = await self._answer(item), "succeeded"
        except asyncio.CancelledError:
            await self.ledger.release(item)
            raise
        except Overloaded as error:
            if not isinstance(error, EngineDied) or item.tries < MOST_TRIES:
                pause = max(LEAST_PAUSE, error.retry_after)
                self._paused_until = time.monotonic() + pause
                await self.ledger.release(item, pause, counted=isinstance(error, EngineDied))
                return
            result = self._failed(error)
        except Exception as error:
            result = self._failed(error)
        await self.ledger.answer(item, outcome, result)
