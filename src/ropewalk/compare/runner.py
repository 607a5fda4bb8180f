"""Runs a comparison: asks every candidate every prompt through the path that serves, judges, measures, and has the rule decide.

What was answered is written down at once and not asked again: a run that was cut off goes on where it was, in this process or another.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError

from ropewalk.compare.records import Comparison, StoredVerdict, claim, get_comparison, release, set_state
from ropewalk.compare.runs import runs_of, set_run_state
from ropewalk.compare.session import Session
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, NotFound, Overloaded
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

LEASE_SECONDS = 15.0  # after which a process that was killed is no longer waited for
LOOK_SECONDS = 2.0  # whether it was cancelled meanwhile; the lease is renewed as often
CANCELLED = "cancelled"


@dataclass(frozen=True)
class Progress:
    """How far a comparison is."""

    done: int
    total: int  # grows when answers make more questions necessary
    doing: str


@dataclass(frozen=True)
class ComparisonRunner:
    """Runs comparisons, in this process, of any caller."""

    store: Store
    models: Models

    async def run(
        self, caller: Caller, comparison_id: str, progress: Callable[[Progress], None] | None = None
    ) -> list[StoredVerdict]:
        """Runs a comparison to its verdicts, or goes on with it."""
        caller.needs("write")
        comparison = await get_comparison(self.store, caller, comparison_id)
        holder = secrets.token_hex(8)
        late = time.monotonic() + LEASE_SECONDS + LOOK_SECONDS
        while not await claim(self.store, comparison.id, holder, LEASE_SECONDS):
            if time.monotonic() >= late:  # somebody renewed it meanwhile
                raise Overloaded(f"comparison {comparison.id} is being run by another process; it goes on there")
            if progress is not None:
                progress(Progress(0, 0, "waiting for the process that ran it"))
            await asyncio.sleep(LOOK_SECONDS / 4)
        try:
            comparison = await set_state(self.store, caller, comparison.id, "running")

            def told(done: int, total: int, doing: str) -> None:
                if progress is not None:
                    progress(Progress(done, total, doing))

            session = Session(self.store, self.models, caller, comparison, told)
            return await self._watched(caller, comparison, holder, session)
        finally:
            await release(self.store, comparison.id, holder)

    async def _watched(self, caller: Caller, comparison: Comparison, holder: str, session: Session) -> list[StoredVerdict]:
        """Works until it is done, is cancelled by somebody, or loses its lease."""
        working = asyncio.create_task(session.work())
        watching = asyncio.create_task(self._watch(caller, comparison.id, holder))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                watching.result()
            verdicts = await working
            await set_state(self.store, caller, comparison.id, "failed" if session.failed else "done", session.failed)
            return verdicts
        except IntegrityError as error:
            deleted = NotFound("the suite was deleted while the comparison ran")
            await set_state(self.store, caller, comparison.id, "failed", str(deleted))
            raise deleted from error
        except asyncio.CancelledError:  # this process ends: the state stays, and another goes on
            raise
        except Exception as error:
            if not isinstance(error, Stopped):
                await set_state(self.store, caller, comparison.id, "failed", str(error) or type(error).__name__)
            raise
        finally:
            for task in (working, watching):
                task.cancel()
            for task in (working, watching):
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _watch(self, caller: Caller, comparison_id: str, holder: str) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if (await get_comparison(self.store, caller, comparison_id)).state != "running":
                raise Stopped(f"comparison {comparison_id} was cancelled; run it again, and it goes on where it was")
            if not await claim(self.store, comparison_id, holder, LEASE_SECONDS):
                raise Stopped(f"comparison {comparison_id} was taken over by another process")


class Stopped(BadInput):
    """Somebody else decided that this run ends."""


async def cancel(store: Store, caller: Caller, comparison_id: str) -> Comparison:
    """Has a comparison end, in whatever process it runs; one that does not run stays as it is."""
    caller.needs("write")
    found = await get_comparison(store, caller, comparison_id)
    if found.state not in ("new", "running"):
        return found
    ended = await set_state(store, caller, comparison_id, "failed", CANCELLED)
    for run in (await runs_of(store, caller, ended)).values():
        if run.state == "running":
            await set_run_state(store, caller, run, "failed", CANCELLED)
    return ended
