"""The worker that runs jobs, in every server process: a job is a child process `ropewalk train`, which dies with its server.

The child's input is a pipe whose other end only this process has: when that ends, by a crash too, the child kills itself and all it has
started. It holds a lock on its run's folder as long as it lives. So no job runs twice: whoever takes one up after a crash waits for that
lock, and goes on from the last checkpoint. Where that was written by another server, it comes from the blob store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ropewalk.config.cluster import RayCluster
from ropewalk.database import now
from ropewalk.errors import DamagedContent, NotFound, OutputError, QuotaExceeded, RopewalkError
from ropewalk.failpoints import failpoint
from ropewalk.files.granted import grant
from ropewalk.jobs.archive import ADAPTER, JobArchive, model_name
from ropewalk.jobs.child import child_environment
from ropewalk.jobs.device import Device
from ropewalk.jobs.judge_desk import PLACE, Asks, JudgeDesk
from ropewalk.jobs.keeping import Keeping
from ropewalk.jobs.ledger import CANCELLED, FILES_GONE, OPEN, Job, Ledger, Order, Told
from ropewalk.jobs.recipe import judges_of
from ropewalk.jobs.run_folder import EventTail, JobFolder
from ropewalk.jobs.tables import jobs
from ropewalk.registry import Entry, Registry
from ropewalk.tracing import traced

POLL_SECONDS = 2.0  # another process may have taken in a job, or have died
LOOK_SECONDS = 0.5  # at a run
COUNT_SECONDS = 10.0  # of a silent run, until its device time is written down: what a server that is killed may lose of it
MOST_FAILURES = 3  # a run that crashes so often by itself is not begun again
AGAIN_SECONDS = 5.0
OF_FILE = "invalid_training_file"  # the error's code, as OpenAI's clients know it
TIDY_SECONDS = 60.0  # between two looks at what runs have left on this machine

log = logging.getLogger("ropewalk.jobs")


@dataclass(frozen=True)
class Options:
    """What this process takes upon it."""

    at_once: int = 1  # jobs of all workspaces; 0: none, they wait for another process
    grace_seconds: float = 60.0  # for a run that is to stop to finish its step and write a checkpoint
    command: tuple[str, ...] = (sys.executable, "-m", "ropewalk", "train")
    cluster: RayCluster | None = None  # on which the child has workers train; None: it trains itself


class Meter:
    """How long a run holds devices, times their number."""

    def __init__(self, devices: int) -> None:
        self._devices, self._from = devices, time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is to be written down, though nothing has happened."""
        return time.monotonic() >= self._from + COUNT_SECONDS

    def read(self) -> int:
        """Microseconds that are not yet written down."""
        return round((time.monotonic() - self._from) * 1e6) * self._devices

    def take(self, told: int) -> None:
        """So many are."""
        self._from += told / self._devices / 1e6


class JobRunner:
    """One process's part in all jobs."""

    def __init__(
        self,
        ledger: Ledger,
        registry: Registry,
        folder: Path,
        options: Options = Options(),
        device: Device | None = None,
        asks: Asks | None = None,
    ) -> None:
        """`asks` judges; None: by a process that serves no models."""
        self.ledger, self.registry, self.folder, self.options, self.device = ledger, registry, folder, options, device
        self._asks = asks
        self.archive = JobArchive(ledger)
        self._working: dict[str, asyncio.Task[None]] = {}
        self._bringing: dict[str, asyncio.Lock] = {}
        self._tidied_at = float("-inf")
        self._wake = asyncio.Event()

    def look(self) -> None:
        """A job has come, or is to stop."""
        self._wake.set()

    def folder_of(self, job_id: str) -> JobFolder:
        return JobFolder(self.folder / job_id)

    async def log_of(self, job: Job) -> str:
        """The end of what a job's run has said, whichever server runs it."""
        if job.id in self._working:
            return await asyncio.to_thread(self.folder_of(job.id).last_words)
        return await self.ledger.log(job) or ""

    async def bring(self, path: Path) -> None:
        """Puts a job's adapter where it is served from, if it lies with another server; other folders are none of ours."""
        if not path.is_relative_to(self.folder.resolve()):
            return
        id = path.relative_to(self.folder.resolve()).parts[0]
        folder = self.folder_of(id)
        async with self._bringing.setdefault(id, asyncio.Lock()):
            if path.is_dir() or id in self._working:
                return
            if not folder.settled:  # what lies here is of a try that another server has finished
                await asyncio.to_thread(folder.tidy, keep=False)
            name = path.name if path.parent.name == "checkpoints" else ADAPTER
            if await self.archive.bring_one(id, name, folder.run):
                folder.settle()

    async def run(self) -> None:
        """Works until it is cancelled; what then runs is stopped with a checkpoint and given back."""
        renewing = asyncio.create_task(self._renew())
        watching = [asyncio.create_task(self.device.watch())] if self.device is not None else []
        try:
            with suppress(RopewalkError):  # what could not be brought is brought by the next start
                await self._publish_again()
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
                await self._forget(job, self.folder_of(job.id))
        if time.monotonic() >= self._tidied_at + TIDY_SECONDS:
            self._tidied_at = time.monotonic()
            await self._tidy()
        while len(self._working) < self.options.at_once:
            claimed = await self.ledger.claim()
            if claimed is None:
                return
            task = asyncio.create_task(self._work(claimed), name=claimed.id)
            self._working[claimed.id] = task
            task.add_done_callback(self._done)

    async def _tidy(self) -> None:
        """Removes what is left on this machine of runs that have ended on another, and of jobs that are no more."""
        ids = [path.name for path in await asyncio.to_thread(lambda: list(self.folder.glob("ftjob_*")))]
        known = await self.ledger.states(ids)
        for id in ids:
            async with self._bringing.setdefault(id, asyncio.Lock()):
                if id not in self._working:
                    await self._tidy_one(self.folder_of(id), id, known.get(id))

    async def _tidy_one(self, folder: JobFolder, id: str, job: Job | None) -> None:
        if job is None:
            await asyncio.to_thread(shutil.rmtree, folder.path, ignore_errors=True)
        elif job.state == "succeeded" and (folder.settled or not await self.archive.has_adapter(id)):
            return  # it is served from here
        elif job.state not in OPEN and job.kept_until is None:
            await asyncio.to_thread(folder.tidy, keep=False)

    async def _publish_again(self) -> None:
        """Models that the registry does not know, though what they are lies in the store: after a restore it may be an empty one."""
        known = {entry.name: entry for entry in await asyncio.to_thread(self.registry.entries)}
        for job in await self.ledger.succeeded():
            base = known.get(job.base)
            if job.name in known or base is None or not await self.archive.has_adapter(job.id):
                continue
            folder = self.folder_of(job.id)
            await asyncio.to_thread(folder.tidy, keep=False)
            for name in (ADAPTER, *map(model_name, await self.archive.steps(job.id))):
                await self.archive.bring_one(job.id, name, folder.run)
            folder.settle()
            await asyncio.to_thread(self._publish, job, folder, base)

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
            await folder.prepare(self.ledger.store, job, Path(base.path), self.options.cluster)
            granted = await grant(self.ledger.store, job.owner, job.file_ids)
        except NotFound:
            await self._gone(job, folder)
            return
        try:
            await self._brought(job, folder, base)
        except OutputError as error:
            await self._later(job, error)
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
            await self._forget(job, folder)
            await self.ledger.end(job, "cancelled", CANCELLED)
        elif order == "pause":
            await self.ledger.end(job, "paused", Told(f"paused:{job.tries}", "The job is paused"), wanted=None)
        elif (why := await asyncio.to_thread(folder.why)) is not None:
            of_file = code == 2 and not folder.events.exists()  # which is begun once the rows are read
            await self._failed(job, folder, OF_FILE if of_file else "training_failed", why)
        else:
            await self._crashed(job, folder, code)

    async def _brought(self, job: Job, folder: JobFolder, base: Entry) -> None:
        """Puts into the folder what another server has kept of the run."""
        try:
            if await self.archive.bring(job, folder.run):
                await asyncio.to_thread(folder.adopt, Path(base.path))
        except DamagedContent as error:
            log.error("what is kept of job %s cannot be read: %s", job.id, error)
            await self.archive.drop(job.id)
            why = "What was kept of the run is damaged; it begins again from what this server has of it"
            await self.ledger.tell(job, [Told(f"damaged:{job.tries}", why, level="warn")])

    async def _train(self, job: Job, folder: JobFolder, granted: bytes) -> tuple[Order | None, int]:
        """Runs the child to its end: why it was stopped, if it was, and its exit code."""
        tail = EventTail(folder.events)
        tail.steps = job.steps
        keeping = Keeping(self.ledger, self.archive, job, folder)
        checked = time.monotonic()
        async with self._turn() as locks, self._judges(job) as judges:
            while True:
                if (order := await self.ledger.order(job)) is not None:
                    return order, 0
                if await asyncio.to_thread(folder.is_free):
                    break
                await asyncio.sleep(LOOK_SECONDS)  # whoever held it lives for a moment yet
            process = await self._started(folder, granted, locks, judges)
            meter = Meter(folder.workers())
            failpoint("job.started")
            stopped: Order | None = None
            deadline = float("inf")
            ended = asyncio.ensure_future(process.wait())
            try:
                while not ended.done():
                    await asyncio.wait({ended}, timeout=LOOK_SECONDS)
                    try:
                        order = await self._look(job, tail, meter)
                        checked = time.monotonic()
                        await keeping.look()
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
                try:
                    await self._look(job, tail, meter, last=True)
                    await keeping.end(more=stopped in (None, "pause"))
                except Exception as error:  # as above
                    log.error("what is left of a try of job %s cannot be kept: %r", job.id, error)
            failpoint("job.trained")
            return stopped, ended.result()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[tuple[int, ...]]:
        if self.device is None:
            yield ()
            return
        async with self.device.alone() as locks:
            yield locks

    @asynccontextmanager
    async def _judges(self, job: Job) -> AsyncIterator[Path | None]:
        """Where its rewards ask the models that give marks; None where it names none."""
        judges = judges_of(job.config)
        if not judges or self._asks is None:
            yield None
            return
        async with JudgeDesk(self._asks, job.owner, judges).opened() as place:
            yield place

    async def _started(
        self, folder: JobFolder, granted: bytes, locks: tuple[int, ...], judges: Path | None
    ) -> asyncio.subprocess.Process:
        with folder.log.open("ab") as told:
            process = await asyncio.create_subprocess_exec(
                *self.options.command,
                folder.config.name,
                "--granted",
                stdin=asyncio.subprocess.PIPE,
                stdout=told,
                stderr=told,
                cwd=folder.path,
                env=self._environment(folder, judges),
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

    def _environment(self, folder: JobFolder, judges: Path | None) -> Mapping[str, str]:
        address = self.options.cluster.address if self.options.cluster is not None else ""
        return {
            **child_environment(os.environ, folder.path / "home"),
            **({"RAY_ADDRESS": address} if address else {}),
            **({PLACE: str(judges)} if judges is not None else {}),
        }

    async def _look(self, job: Job, tail: EventTail, meter: Meter, *, last: bool = False) -> Order | None:
        told, values = await asyncio.to_thread(tail.read)
        if told or last or meter.is_due:
            held = meter.read()
            if not await self.ledger.tell(job, told, **values, device_time=jobs.c.device_time + held):
                return "lost"
            meter.take(held)
        return await self.ledger.order(job)

    # -- what comes of it

    async def _succeeded(self, job: Job, folder: JobFolder, base: Entry) -> None:
        tail = EventTail(folder.events)
        tail.steps = job.steps
        told, values = await asyncio.to_thread(tail.read)  # what a process that died had not yet told
        if not await self.ledger.tell(job, told, **values):
            return
        try:
            if not await self.archive.keep_adapter(job, folder.run):
                return
        except QuotaExceeded:
            why = "The model is trained, and the workspace has no room to keep it: delete files, or ask for a higher limit, and resume the job"
            await self.ledger.end(job, "paused", Told(f"full:{job.tries}", why, level="error"), wanted=None)
            return
        except OutputError as error:
            await self._later(job, error)
            return
        failpoint("job.kept")
        await asyncio.to_thread(self._publish, job, folder, base)
        failpoint("job.published")
        await asyncio.to_thread(folder.tidy, keep=True)
        await self.archive.drop_resumable(job.id)
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
            **({"reward_model": " ".join(judges)} if (judges := judges_of(job.config)) else {}),
            **({"data_generator": " ".join(job.data_generator)} if job.data_generator else {}),
            **({"user": job.user_id} if job.user_id is not None else {}),
        }
        for step, path in folder.checkpoints().items():
            self.registry.publish_adapter(f"{job.name}:ckpt-step-{step}", path, base.name, {**lineage, "step": str(step)})
        self.registry.publish_adapter(job.name, folder.run / "adapter", base.name, lineage)

    async def _forget(self, job: Job, folder: JobFolder) -> None:
        """Erases all that a run has made, here and in the store."""
        await asyncio.to_thread(folder.tidy, keep=False)
        await self.archive.drop(job.id)

    async def _later(self, job: Job, error: Exception) -> None:
        """What is kept of a run cannot be reached: the bucket is gone for a moment, or the disk is full."""
        log.error("what is kept of job %s cannot be reached: %s", job.id, error)
        told = Told(f"later:{job.tries}", "The store cannot be reached; the job goes on when it can", level="warn")
        await self.ledger.end(job, "queued", told, lease_until=now() + round(AGAIN_SECONDS * 1_000_000))

    async def _failed(self, job: Job, folder: JobFolder, code: str, why: str) -> None:
        """What it goes on from is kept for some days: memory or disk may only have been short for a while. A file never changes."""
        again = code != OF_FILE
        await (asyncio.to_thread(folder.set_aside) if again else self._forget(job, folder))
        told = Told(f"failed:{job.tries}", "The job has failed; its error says why", level="error")
        await self.ledger.end(job, "failed", told, (code, why), kept_until=now() + self.ledger.keep if again else None)

    async def _gone(self, job: Job, folder: JobFolder) -> None:
        await self._forget(job, folder)
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
