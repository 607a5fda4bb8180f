"""What `ropewalk jobs ...` does: it looks into the same tables as the server, which does what is asked for here."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ropewalk.database import timestamp
from ropewalk.errors import BadInput
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.jobs.ledger import Job, Ledger
from ropewalk.jobs.recipe import reproducing
from ropewalk.jobs.run_folder import JobFolder
from ropewalk.tenants.caller import Caller

T = TypeVar("T")
TIMES = ("created_at", "started_at", "finished_at", "kept_until")
EVENTS = 20  # the last ones of `show`


@dataclass(frozen=True)
class Place:
    """A workspace of a store."""

    settings: Settings
    workspace: str

    def run(self, work: Callable[[Ledger, Caller], Awaitable[T]]) -> T:
        """Opens the store, does the work in the name of this machine's user, closes it."""

        async def opened() -> T:
            store = await Store.open(self.settings)
            try:
                return await work(Ledger(store), await store.local_caller(self.workspace))
            finally:
                await store.close()

        return asyncio.run(opened())

    def folder_of(self, job: Job) -> JobFolder:
        return JobFolder(self.settings.data.expanduser() / "jobs" / job.id)


def list_jobs(place: Place, limit: int, as_json: bool) -> int:
    """Prints jobs, newest first."""
    if limit < 1:
        raise BadInput(f"--limit: {limit} is no number of jobs; expected 1 or more")
    page = place.run(lambda ledger, caller: ledger.list(caller, limit))
    if as_json:
        print(json.dumps({"data": [_told(job) for job in page.jobs], "has_more": page.more}))
        return 0
    for job in page.jobs:
        of = f"step {job.step:,} of {job.steps:,}" if job.steps else ""
        print("  ".join(filter(None, (job.id, timestamp(job.created_at)[:19], job.status, job.base, of, job.model or ""))))
    return 0


def show_job(place: Place, id: str, as_json: bool) -> int:
    """Prints a job, and its last events."""

    async def work(ledger: Ledger, caller: Caller) -> tuple[Job, str | None, list[Any]]:
        job = await ledger.show(caller, id)
        events, _ = await ledger.events(caller, id, EVENTS)
        return job, await ledger.error(job), list(reversed(events))

    job, error, events = place.run(work)
    if as_json:
        print(json.dumps({**_told(job), "error": error, "events": [asdict(event) for event in events]}))
        return 0
    for name, value in {**_told(job), "error": error}.items():
        if value not in (None, "", {}):
            print(f"{name:16} {json.dumps(value) if isinstance(value, dict | list) else value}")
    for event in events:
        print(f"{timestamp(event.created_at)[:19]}  {event.message}")
    return 0


def cancel_job(place: Place, id: str) -> int:
    """Has a job end; a server does it."""
    job = place.run(lambda ledger, caller: ledger.want(caller, id, "cancel"))
    print(f"{job.id} is {'being cancelled' if job.wanted else job.state}")
    return 0


def resume_job(place: Place, id: str) -> int:
    """Queues a paused or failed job again; a server runs it."""
    job = place.run(lambda ledger, caller: ledger.resume(caller, id))
    print(f"{job.id} is {job.state} again")
    return 0


def print_log(place: Place, id: str) -> int:
    """Prints what a job's run has said: all of it where it ran on this machine, else its end."""

    async def work(ledger: Ledger, caller: Caller) -> tuple[Job, str | None]:
        job = await ledger.show(caller, id)
        return job, await ledger.log(job)

    job, end = place.run(work)
    log = place.folder_of(job).log
    if not log.is_file():
        if end is None:
            raise BadInput(f"{job.id} has no log: it has not begun, or its file was deleted")
        print(end)
        return 0
    with log.open(encoding="utf-8", errors="replace") as lines:
        shutil.copyfileobj(lines, sys.stdout)
    return 0


def _told(job: Job) -> dict[str, Any]:
    left_out = ("holder", "lease_until", "wanted", "failures", "organization_id", "user_id", "key_id", "config", "device_time")
    told = {name: value for name, value in asdict(job).items() if name not in left_out}
    times = {name: timestamp(told[name]) for name in TIMES if told[name] is not None}
    return {**told, **times, "device_seconds": round(job.device_time / 1e6, 3), "config": reproducing(job.method, job.config)}
