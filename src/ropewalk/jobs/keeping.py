"""What is kept of a run while it goes on: its checkpoints as they are written, one packing at a time, and the end of its log."""

from __future__ import annotations

import asyncio
import logging
import time

from ropewalk.errors import NotFound, OutputError, QuotaExceeded
from ropewalk.jobs.archive import JobArchive, steps_of
from ropewalk.jobs.ledger import Job, Ledger, Told
from ropewalk.jobs.run_folder import JobFolder

LOG_SECONDS = 2.0  # between two looks at the log

log = logging.getLogger("ropewalk.jobs")


class Keeping:
    """One run's."""

    def __init__(self, ledger: Ledger, archive: JobArchive, job: Job, folder: JobFolder) -> None:
        self._ledger, self._archive, self._job, self._folder = ledger, archive, job, folder
        self._packing: asyncio.Task[None] | None = None
        self._steps: list[int] = []
        self._said, self._said_at = "", 0.0

    async def look(self) -> None:
        """Begins to keep what is new, and does not wait for it."""
        if time.monotonic() >= self._said_at + LOG_SECONDS:
            await self._keep_log()
        if self._packing is None or self._packing.done():
            steps = await asyncio.to_thread(steps_of, self._folder.run)
            if steps != self._steps:
                self._steps = steps
                self._packing = asyncio.create_task(self._keep())

    async def end(self, *, more: bool) -> None:
        """Waits for what has begun; with `more`, keeps what is new since then."""
        if self._packing is not None:
            await asyncio.wait({self._packing})
        if more:
            await self._keep()
        await self._keep_log()

    async def _keep(self) -> None:
        try:
            await self._archive.keep_checkpoints(self._job, self._folder.run)
        except QuotaExceeded:
            last = self._steps[-1] if self._steps else 0
            why = f"The checkpoint of step {last} stays on this server alone: the workspace has no room for it. The run goes on"
            await self._ledger.tell(self._job, [Told(f"unkept:{last}", why, level="warn")])
        except (
            OutputError,
            NotFound,
        ) as error:  # the next checkpoint tries again; where a file is gone, the run is being stopped
            log.warning("a checkpoint of job %s is not kept: %s", self._job.id, error)

    async def _keep_log(self) -> None:
        self._said_at = time.monotonic()
        said = await asyncio.to_thread(self._folder.last_words)
        if said != self._said:
            self._said = said
            await self._ledger.keep_log(self._job, said)
