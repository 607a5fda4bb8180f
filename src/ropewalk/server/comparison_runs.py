"""Comparisons that run in the background of this process: begun, cancelled, and taken up again when the process that ran them has ended."""

from __future__ import annotations

import asyncio
import logging

from ropewalk.compare.records import Comparison, get_comparison, set_state, unfinished
from ropewalk.compare.runner import ComparisonRunner, Progress, cancel
from ropewalk.errors import BadInput
from ropewalk.files.store import Store
from ropewalk.server import logs
from ropewalk.tenants.caller import Caller

LOOK_SECONDS = 15.0  # between two looks for what another process left behind


class ComparisonRuns:
    """One process's part in all comparisons."""

    def __init__(self, store: Store, runner: ComparisonRunner) -> None:
        self._store, self._runner = store, runner
        self._running: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, Progress] = {}

    def progress_of(self, id: str) -> Progress | None:
        """How far a comparison is; None where another process runs it, or none."""
        return self._progress.get(id)

    async def start(self, caller: Caller, id: str) -> Comparison:
        """Begins, or goes on with, a comparison; one that runs already is left alone."""
        caller.needs("write")
        found = await get_comparison(self._store, caller, id)
        if found.suite_id is None and found.state == "done":
            raise BadInput(
                "this comparison is of cards alone, of which nothing can be run; link a card to a model that is served"
            )
        if id not in self._running:
            found = await set_state(self._store, caller, id, "running")
            self._begin(caller, id)
        return found

    async def decide(self, caller: Caller, id: str) -> Comparison:
        """Runs one of cards alone, of which nothing is asked, while somebody waits."""
        await self._runner.run(caller, id)
        return await get_comparison(self._store, caller, id)

    async def cancel(self, caller: Caller, id: str) -> Comparison:
        """Ends a run; what was answered is kept, and is not asked again."""
        caller.needs("write")
        found = await get_comparison(self._store, caller, id)
        if found.state != "running":
            raise BadInput(f"this comparison does not run: it is {found.state}")
        await cancel(self._store, caller, id)  # first, so that nobody takes it up again
        if (task := self._running.get(id)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return await get_comparison(self._store, caller, id)

    async def run(self) -> None:
        """Takes up what was left behind, until it is cancelled; what this process works on is then left to another."""
        try:
            while True:
                try:
                    for caller, id in await unfinished(self._store):
                        if id not in self._running:
                            self._begin(caller, id)
                except Exception as error:  # the database is busy, or gone for a moment
                    logs.event("comparisons_failed", logging.ERROR, error)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            working = list(self._running.values())
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)

    def _begin(self, caller: Caller, id: str) -> None:
        task = asyncio.create_task(self._work(caller, id))
        self._running[id] = task

    async def _work(self, caller: Caller, id: str) -> None:
        try:
            await self._runner.run(caller, id, lambda progress: self._progress.update({id: progress}))
        except Exception as error:  # the runner has written down why
            logs.event("comparison_failed", logging.ERROR, error, comparison=id)
        finally:
            self._running.pop(id, None)
            self._progress.pop(id, None)
