"""The worker that runs jobs, in every server process: a job is a child process `ropewalk train`, which dies with its server.

The child's input is a pipe whose other end only this process has: when that ends, by a crash too, the child kills itself and all it has
started. It holds a lock on its run's folder as long as it lives. So no job runs twice: whoever takes one up after a crash waits for that
lock, and goes on from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.database import now
from ropewalk.errors import NotFound, RopewalkError
from ropewalk.failpoints import failpoint
from ropewalk.files.granted import grant
from ropewalk.jobs.device import Device
from ropewalk.jobs.ledger import CANCELLED, FILES_GONE, Job, Ledger, Order, Told
from ropewalk.jobs.run_folder import EventTail, JobFolder
from ropewalk.registry import Entry, Registry
from ropewalk.tracing import traced

POLL_SECONDS = 2.0  # another process may have taken in a job, or have died
LOOK_SECONDS = 0.5  # at a run
MOST_FAILURES = 3  # a run that crashes so often by itself is not begun again
AGAIN_SECONDS = 5.0
# Whatever would tell the child more than its files, or have it tell others.
HIDDEN = ("ROPEWALK_ROOT_KEY", "ROPEWALK_DATABASE_URL", "WANDB_", "MLFLOW_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

log = logging.getLogger("ropewalk.jobs")


@dataclass(frozen=True)
class Options:
    """What this process takes upon it."""

    at_once: int = 1  # jobs of all workspaces; 0: none, they wait for another process
    grace_seconds: float = 60.0  # for a run that is to stop to finish its step and write a checkpoint
    command: tuple[str, ...] = (sys.executable, "-m", "ropewalk", "train")


class JobRunner:
    """One process's part in all jobs."""

    def __init__(
        self, ledger: Ledger, registry: Registry, folder: Path, options: Options = Options(), device: Device | None = None
    ) -> None:
        self.ledger, self.registry, self.folder, self.options, self.device = ledger, registry, folder, options, device
        self._working: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def look(self) -> None:
        """A job has come, or is to stop."""
        self._wake.set()

    def folder_of(self, job_id: str) -> JobFolder:
        return JobFolder(self.folder / job_id)

    async def run(self) -> None:
        """Works until it is cancelled; what then runs is stopped with a checkpoint and given back."""
        renewing = asyncio.create_task(self._renew())
        watching = [asyncio.create_task(self.device.watch())] if self.device is not None else []
        try:
            while True:
                self._wake.clear()
                try:
                    await self._round()
                except Exception as error:  # the database is busy, or gone for a moment: the next round tries again
                    log.error("jobs cannot be looked after: %r", error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._wake.wait()
        finally:
            for task in self._working.values():
                task.cancel()
            await asyncio.gather(*self._working.values(), return_exceptions=True)
            for task in (renewing, *watching):
                task.cancel()
            await asyncio.gather(renewing, *watching, return_exceptions=True)

    async def _round(self) -> None:
        for job in await self.ledger.settle():
            if job.wanted != "pause":
                await asyncio.to_thread(self.folder_of(job.id).tidy, keep=False)
        while len(self._working) < self.options.at_once:
            claimed = await self.ledger.claim()
            if claimed is None:
                return
            task = asyncio.create_task(self._work(claimed), name=claimed.id)
            self._working[claimed.id] = task
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        id = task.get_name()
        self._working.pop(id, None)
        self.look()
        if not task.cancelled() and (error := task.exception()) is not None:  # its lease runs out, and it is tried again
            log.error("job %s cannot be looked after: %r", id, error)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self.ledger.lease / 4_000_000)
            if self._working:
                try:
                    await self.ledger.renew()
                except Exception as error:  # in time the next will do
                    log.error("the leases of jobs cannot be renewed: %r", error)

    # -- one job

    @traced("job", lambda self, job: {"job.id": job.id, "job.tries": job.tries, "job.base": job.base})
    async def _work(self, job: Job) -> None:
        folder = self.folder_of(job.id)
        try:
            await self._run(job, folder)
        except asyncio.CancelledError:  # the server stops
            await self.ledger.end(
                job, "queued", Told(f"released:{job.tries}", "The server stops; the job goes on with the next")
            )
            raise
        except RopewalkError as error:
            await self._failed(job, folder, "job_failed", str(error))

    async def _run(self, job: Job, folder: JobFolder) -> None:
        try:
            base = await asyncio.to_thread(self.registry.resolve, job.base)
        except NotFound:
            await self._failed(job, folder, "model_not_found", f"the base '{job.base}' is not published any more")
            return
        try:
            await folder.prepare(self.ledger.store, job, Path(base.path))
            granted = await grant(self.ledger.store, job.owner, job.file_ids)
        except NotFound:
            await self._gone(job, folder)
            return
        order, code = None, 0
        if not folder.finished:  # it may have, in a process that died before it could say so
            order, code = await self._train(job, folder, granted)
        if order == "lost":
            return
        if folder.finished:
            await self._succeeded(job, folder, base)
        elif order == "files":
            await self._gone(job, folder)
        elif order == "cancel":
            await asyncio.to_thread(folder.tidy, keep=False)
            await self.ledger.end(job, "cancelled", CANCELLED)
        elif order == "pause":
            await self.ledger.end(job, "paused", Told(f"paused:{job.tries}", "The job is paused"), wanted=None)
        elif (why := await asyncio.to_thread(folder.why)) is not None:
            await self._failed(job, folder, "invalid_training_file" if code == 2 else "training_failed", why)
        else:
            await self._crashed(job, folder, code)

    async def _train(self, job: Job, folder: JobFolder, granted: bytes) -> tuple[Order | None, int]:
        """Runs the child to its end: why it was stopped, if it was, and its exit code."""
        tail = EventTail(folder.events)
        tail.steps = job.steps
        checked = time.monotonic()
        async with self._turn() as locks:
            while True:
                if (order := await self.ledger.order(job)) is not None:
                    return order, 0
                if await asyncio.to_thread(folder.is_free):
                    break
                await asyncio.sleep(LOOK_SECONDS)  # whoever held it lives for a moment yet
            process = await self._started(folder, granted, locks)
            failpoint("job.started")
            stopped: Order | None = None
            deadline = float("inf")
            ended = asyncio.ensure_future(process.wait())
            try:
                while not ended.done():
                    await asyncio.wait({ended}, timeout=LOOK_SECONDS)
                    try:
                        order = await self._look(job, tail)
                        checked = time.monotonic()
                    except Exception as error:  # the database is gone for a moment; for longer, the lease is lost
                        log.error("job %s cannot be looked after: %r", job.id, error)
                        order = "lost" if time.monotonic() > checked + self.ledger.lease / 1e6 else None
                    if order is not None and stopped is None and not ended.done():
                        stopped, deadline = order, time.monotonic() + self.options.grace_seconds
                        _signal(process, signal.SIGTERM if order in ("pause", "cancel") else signal.SIGKILL)
                    if time.monotonic() > deadline:
                        _kill(process)
            except asyncio.CancelledError:
                if not ended.done():
                    _signal(process, signal.SIGTERM)
                    await asyncio.wait({ended}, timeout=self.options.grace_seconds)
                raise
            finally:
                _kill(process)
                await ended
                with suppress(Exception):
                    await self._look(job, tail)
            failpoint("job.trained")
            return stopped, ended.result()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[tuple[int, ...]]:
        if self.device is None:
            yield ()
            return
        async with self.device.alone() as locks:
            yield locks

    async def _started(self, folder: JobFolder, granted: bytes, locks: tuple[int, ...]) -> asyncio.subprocess.Process:
        with folder.log.open("ab") as told:
            process = await asyncio.create_subprocess_exec(
                *self.options.command,
                folder.config.name,
                "--granted",
                stdin=asyncio.subprocess.PIPE,
                stdout=told,
                stderr=told,
                cwd=folder.path,
                env=_environment(folder),
                pass_fds=locks,
                start_new_session=True,
            )
        assert process.stdin is not None
        with suppress(OSError):  # where memory runs out, it is the run that ends, not the server
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
        process.stdin.write(granted)  # and left open, see above
        with suppress(ConnectionError):
            await process.stdin.drain()
        return process

    async def _look(self, job: Job, tail: EventTail) -> Order | None:
        told, values = await asyncio.to_thread(tail.read)
        if told and not await self.ledger.tell(job, told, **values):
            return "lost"
        return await self.ledger.order(job)

    # -- what comes of it

    async def _succeeded(self, job: Job, folder: JobFolder, base: Entry) -> None:
        tail = EventTail(folder.events)
        tail.steps = job.steps
        told, values = await asyncio.to_thread(tail.read)  # what a process that died had not yet told
        if not await self.ledger.tell(job, told, **values):
            return
        await asyncio.to_thread(self._publish, job, folder, base)
        failpoint("job.published")
        await asyncio.to_thread(folder.tidy, keep=True)
        await self.ledger.end(job, "succeeded", Told("succeeded", "The job has successfully completed"), model=job.name)

    def _publish(self, job: Job, folder: JobFolder, base: Entry) -> None:
        """The adapter and its checkpoints, as models; doing it again changes nothing."""
        record = folder.record()
        lineage = {
            "file": " ".join(job.file_ids),
            "job": job.id,
            "run": str(folder.run.resolve()),
            "method": job.method,
            "config": job.config_digest,
            "versions": " ".join(f"{name}={version}" for name, version in record.get("versions", {}).items()),
            "workspace": job.workspace_id,
            **({"user": job.user_id} if job.user_id is not None else {}),
        }
        for step, path in folder.checkpoints().items():
            self.registry.publish_adapter(f"{job.name}:ckpt-step-{step}", path, base.name, {**lineage, "step": str(step)})
        self.registry.publish_adapter(job.name, folder.run / "adapter", base.name, lineage)

    async def _failed(self, job: Job, folder: JobFolder, code: str, why: str) -> None:
        await asyncio.to_thread(folder.tidy, keep=False)
        told = Told("failed", "The job has failed; its error says why", level="error")
        await self.ledger.end(job, "failed", told, (code, why))

    async def _gone(self, job: Job, folder: JobFolder) -> None:
        await asyncio.to_thread(folder.tidy, keep=False)
        await self.ledger.end(job, "cancelled", FILES_GONE)

    async def _crashed(self, job: Job, folder: JobFolder, code: int) -> None:
        """A run that has ended without a word is begun again from its last checkpoint, but not for ever."""
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if job.failures + 1 >= MOST_FAILURES:
            await self._failed(
                job, folder, "run_crashed", f"the run ended by {how}, {MOST_FAILURES} times; the last line of its log: "
                f"{folder.last_words().rpartition(chr(10))[2][-300:]}",
            )  # fmt: skip
            return
        told = Told(f"crashed:{job.tries}", f"The run ended by {how}; it goes on from its last checkpoint", level="warn")
        wait = round(AGAIN_SECONDS * 2**job.failures * 1_000_000)
        await self.ledger.end(job, "queued", told, failures=job.failures + 1, lease_until=now() + wait)


def _environment(folder: JobFolder) -> Mapping[str, str]:
    kept: dict[str, Any] = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
    return {**kept, "ROPEWALK_HOME": str(folder.path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if number == signal.SIGKILL:
        _kill(process)
    elif process.returncode is None:
        process.send_signal(number)


def _kill(process: asyncio.subprocess.Process) -> None:
    """The child and all that it has started."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
