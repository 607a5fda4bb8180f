"""Question jobs in the background of this process: once the batch of one has been answered, its rows become a file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ropewalk.batches.ledger import Batch, Ledger
from ropewalk.chat.questions import Rows, Wanted, lineage, name_of, passages, reply_text
from ropewalk.engine.models import Models
from ropewalk.errors import NotFound, RopewalkError
from ropewalk.files import questions
from ropewalk.files.documents import document
from ropewalk.files.incoming import Made
from ropewalk.files.questions import KIND, QuestionJob
from ropewalk.files.store import Store
from ropewalk.server import logs

LOOK_SECONDS = 1.0  # between two looks at batches that are being answered
IDLE_SECONDS = 15.0  # where there is none: another process may have taken one in, or have died


def custom_id(number: int) -> str:
    """The name of a passage's request."""
    return f"chunk-{number}"


class QuestionRuns:
    """One process's part in all question jobs."""

    def __init__(self, store: Store, ledger: Ledger, models: Models) -> None:
        self._store, self._ledger, self._models = store, ledger, models
        self._wake = asyncio.Event()

    def look(self) -> None:
        """A job has come."""
        self._wake.set()

    async def run(self) -> None:
        """Gathers what has been answered, until it is cancelled."""
        while True:
            self._wake.clear()
            pause = LOOK_SECONDS
            try:
                while (job := await questions.claim(self._store)) is not None:
                    await self._gather(job)
                if not await questions.unfinished(self._store):
                    pause = IDLE_SECONDS
            except Exception as error:  # the database is busy, or gone for a moment; a lease that runs out brings the job back
                logs.event("questions_failed", logging.ERROR, error)
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _gather(self, job: QuestionJob) -> None:
        rows = Rows(job.file_id)
        try:
            batch = await self._ledger.find(job.batch_id)
            if batch is None:
                raise NotFound("its batch was deleted before it was answered")
            output = await self._made(job, batch, rows)
        except RopewalkError as error:
            await questions.end(
                self._store, job, rows=len(rows.rows), dropped=rows.dropped, output_file_id=None, error=str(error)
            )
            return
        await questions.end(self._store, job, rows=len(rows.rows), dropped=rows.dropped, output_file_id=output)

    async def _made(self, job: QuestionJob, batch: Batch, rows: Rows) -> str:
        """The id of the file of rows."""
        caller, wanted = batch.owner, Wanted(**job.wanted)
        file = await self._store.show(caller, job.file_id)
        shown = passages(await document(self._store, caller, job.file_id), wanted)
        by_id = {custom_id(passage.number): passage for passage in shown}
        failed = ""
        async for id, outcome, result in await self._ledger.results(caller, job.batch_id):
            if outcome == "succeeded" and id in by_id:
                rows.add(by_id[id], reply_text(result["message"]))
            else:
                failed = failed or _why(outcome, result)
        if not rows.rows:
            raise NotFound(failed or "no row was written whose quote stands in the file; ask a model that is better at it")
        if (made := await questions.made_before(self._store, job)) is not None:
            return made
        resolved = (await asyncio.to_thread(self._models.find, wanted.model, caller)).shown
        writer = await asyncio.to_thread(self._models.name_behind, wanted.model)
        said = lineage(wanted, writer, resolved, rows, shown)
        told = Made(KIND, questions.name_of(job), (job.file_id,), {"job": job.id, **said})
        name = name_of(file.filename)
        return (await self._store.put(caller, rows.lines(), name, purpose="fine-tune", made=told)).id


def _why(outcome: str, result: Mapping[str, Any] | None) -> str:
    if outcome != "errored" or result is None:
        return f"its requests were {outcome} before they were answered"
    return str(result.get("error", {}).get("error", {}).get("message", outcome))
