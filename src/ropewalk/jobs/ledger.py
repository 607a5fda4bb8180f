"""Jobs as they are written down: one server process at a time holds a job under a lease, and each job ends once.

submit   a job, its files looked up in the caller's workspace, under the workspace's limits
claim    the next job to run, and the number of this try; whoever holds it renews its lease, and after a crash that runs out
end      what came of it, only by whoever still holds it
settle   what was cancelled or paused while nobody held it, and what a failed one keeps for long enough

What a file says stands nowhere here but in a job's error, which is sealed and goes with the file.
"""

from __future__ import annotations

import builtins
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Table, delete, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound, QuotaExceeded
from ropewalk.failpoints import failpoint
from ropewalk.files.generators import generators
from ropewalk.files.store import Store
from ropewalk.files.tables import files
from ropewalk.ids import new_id
from ropewalk.jobs.recipe import Asked, make_recipe
from ropewalk.jobs.tables import job_errors, job_events, job_logs, jobs
from ropewalk.tenants.audit import append
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import workspaces
from ropewalk.tenants.workspaces import OF_JOBS, workspace_key
from ropewalk.vault import unwrap, wrap

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Order = Literal["pause", "cancel", "lost", "files"]  # why a run is to stop; files: those that it learns from are gone
OPEN: tuple[State, ...] = ("queued", "running", "paused")
KEPT_DAYS = 7  # a failed job can be resumed for so long
MADE_AS = "job"  # the kind under which a job stands among what was made from a file
MOST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Job:
    """One job. Times are microseconds."""

    id: str
    organization_id: str
    workspace_id: str
    user_id: str | None
    key_id: str | None
    state: State
    wanted: Literal["pause", "cancel"] | None
    base: str
    suffix: str
    method: str
    hyperparameters: Mapping[str, Any]
    seed: int
    metadata: Mapping[str, str] | None
    training_file: str
    validation_file: str | None
    file_bytes: int
    config: Mapping[str, Any]
    config_digest: str
    holder: str | None
    lease_until: int
    tries: int
    failures: int
    model: str | None
    trained_tokens: int | None
    step: int
    steps: int | None
    data_generator: Sequence[str] | None  # models that wrote its rows
    device_time: int  # that its runs held devices, times their number
    error_code: str | None
    kept_until: int | None  # of a failed one that can go on from what it has kept
    created_at: int
    started_at: int | None
    finished_at: int | None

    @property
    def owner(self) -> Caller:
        """Whose files it reads."""
        return Caller(self.organization_id, self.workspace_id, self.key_id, self.user_id)

    @property
    def file_ids(self) -> tuple[str, ...]:
        return (self.training_file,) if self.validation_file is None else (self.training_file, self.validation_file)

    @property
    def name(self) -> str:
        """What the model that comes of it is called."""
        return ":".join(filter(None, ("ft", self.base, self.suffix, self.id[-8:])))

    @property
    def resumable(self) -> bool:
        """Whether it can go on where it stopped: a paused one, and for some days a failed one."""
        return self.state == "paused" or (self.kept_until is not None and self.kept_until > now())

    @property
    def status(self) -> str:
        """Its state as OpenAI's clients know it: until the files are read, a run that has begun validates them."""
        return "validating_files" if self.state == "running" and self.steps is None else self.state


class Told(NamedTuple):
    """Something that happened.  run -> queue"""

    key: str
    message: str
    kind: Literal["message", "metrics"] = "message"
    level: Literal["info", "warn", "error"] = "info"
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Event:
    """The same, written down."""

    job_id: str
    number: int
    key: str
    level: str
    kind: str
    message: str
    data: Mapping[str, Any] | None
    created_at: int

    @property
    def id(self) -> str:
        return f"ftevent_{self.job_id.partition('_')[2]}_{self.number}"


@dataclass(frozen=True)
class Limits:
    """What a workspace that has no limits of its own may have at a time."""

    running: int = 1
    queued: int = 20  # jobs that have not ended, those that run included
    file_bytes: int = 2_000_000_000  # of all files of its jobs that have not ended


@dataclass(frozen=True)
class Page:
    """Jobs, newest first."""

    jobs: tuple[Job, ...]
    more: bool


COLUMNS = [jobs.c[field.name] for field in fields(Job)]
EVENT_COLUMNS = [job_events.c[field.name] for field in fields(Event)]


class Ledger:
    """The jobs of one installation, as one process sees them."""

    def __init__(self, store: Store, limits: Limits = Limits(), lease_seconds: float = 20.0) -> None:
        self.store, self.database, self.limits = store, store.database, limits
        self.lease = round(lease_seconds * 1_000_000)
        self.keep = KEPT_DAYS * 86_400_000_000
        self.holder = secrets.token_hex(8)
        self._last = ""  # the workspace that had the last turn

    # -- what clients ask for

    async def submit(self, caller: Caller, asked: Asked, request_id: str = "") -> Job:
        """A job, queued; BadInput for what it may not hold, NotFound for a file that is not the caller's."""
        caller.needs("write")
        found = [await self.store.show(caller, id) for id in filter(None, (asked.training_file, asked.validation_file))]
        for file, key in zip(found, ("training_file", "validation_file")):
            if file.expired:
                raise BadInput(f"{key}: file `{file.id}` has expired; upload it again")
        validation = found[1] if len(found) > 1 else None
        if validation is not None and validation.sha256 == found[0].sha256:
            raise BadInput("validation_file: it is the training file; give other rows, or ropewalk.val_set_size")
        seed = secrets.randbelow(MOST_SEED) if asked.seed is None else asked.seed
        recipe = make_recipe(asked, seed, found[0], validation)
        job = Job(
            id=new_id("ftjob"),
            organization_id=caller.organization_id,
            workspace_id=caller.workspace_id,
            user_id=caller.user_id,
            key_id=caller.key_id,
            state="queued",
            wanted=None,
            base=asked.base,
            suffix=asked.suffix,
            method=asked.method,
            hyperparameters=recipe.hyperparameters,
            seed=seed,
            metadata=asked.metadata,
            training_file=found[0].id,
            validation_file=validation.id if validation else None,
            file_bytes=sum(file.size for file in found),
            config=recipe.config,
            config_digest=recipe.digest,
            holder=None,
            lease_until=0,
            tries=0,
            failures=0,
            model=None,
            trained_tokens=None,
            step=0,
            steps=None,
            data_generator=list(dict.fromkeys(name for file in found for name in generators(file))) or None,
            device_time=0,
            error_code=None,
            kept_until=None,
            created_at=now(),
            started_at=None,
            finished_at=None,
        )
        async with self.database.writing() as connection:
            for id in sorted(set(job.file_ids)):  # files come before others of our tables in every transaction
                await self.store.keep_rows(connection, id, MADE_AS, job.id)
            await self._within_limits(connection, job)
            await connection.execute(insert(jobs).values(**{field.name: getattr(job, field.name) for field in fields(Job)}))
            await _tell(connection, job.id, [Told("created", f"Created fine-tuning job: {job.id}")])
            detail = {"files": " ".join(job.file_ids), "base": job.base}
            await append(connection, caller, "job_created", job.id, request_id=request_id, detail=detail)
        failpoint("job.submitted")
        return job

    async def show(self, caller: Caller, id: str) -> Job:
        """One job; NotFound also for another's."""
        caller.needs("read")
        async with self.database.reading() as connection:
            return await self._find(connection, caller, id)

    async def list(
        self, caller: Caller, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Page:
        """A page, newest first; only jobs that have all of `metadata`."""
        caller.needs("read")
        query = select(*COLUMNS).where(_visible(caller))
        for name, value in (metadata or {}).items():
            query = query.where(jobs.c.metadata[name].as_string() == value)
        async with self.database.reading() as connection:
            if after is not None:
                edge = await self._find(connection, caller, after)
                query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < (edge.created_at, edge.id))
            rows = (await connection.execute(query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit + 1))).all()
        return Page(tuple(map(_job, rows[:limit])), len(rows) > limit)

    async def belonging(self, caller: Caller, ids: Collection[str]) -> builtins.list[Job]:
        """The caller's jobs of these ids, and those that have not ended, newest first."""
        caller.needs("read")
        query = select(*COLUMNS).where(_visible(caller), jobs.c.id.in_(ids) | jobs.c.state.in_(OPEN))
        async with self.database.reading() as connection:
            rows = (await connection.execute(query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()))).all()
        return [_job(row) for row in rows]

    async def want(self, caller: Caller, id: str, wanted: Literal["pause", "cancel"], request_id: str = "") -> Job:
        """Has a job stop, for good or until it is resumed; what runs stops after its step, with a checkpoint. A failed one that is
        cancelled gives up what it kept."""
        caller.needs("write")
        async with self.database.writing() as connection:
            job = await self._find(connection, caller, id, lock=True)
            if wanted == "cancel" and job.state == "failed" and job.resumable:  # it stays failed
                await _set(connection, job, kept_until=now())
                await append(connection, caller, "job_stopped", id, request_id=request_id, detail={"asked": wanted})
                return await self._find(connection, caller, id)
            if job.state not in OPEN or (wanted == "pause" and (job.state == "paused" or job.wanted == "cancel")):
                raise BadInput(f"Job `{job.id}` is {job.wanted or job.state}; it cannot be {_DONE[wanted]}.")
            if job.state == "running":
                await _set(connection, job, wanted=wanted)
                await _tell(connection, id, [Told(f"{wanted}:{job.tries}", f"The job is being {_DONE[wanted]}")])
            else:
                await self._stop(connection, job, wanted)
            await append(connection, caller, "job_stopped", id, request_id=request_id, detail={"asked": wanted})
            return await self._find(connection, caller, id)

    async def resume(self, caller: Caller, id: str, request_id: str = "") -> Job:
        """Queues a paused or failed job again; it goes on from its last checkpoint."""
        caller.needs("write")
        async with self.database.writing() as connection:
            job = await self._find(connection, caller, id, lock=True)
            if not job.resumable:
                raise BadInput(
                    f"Job `{job.id}` is {job.wanted or job.state}; only a paused one can be resumed, and for {KEPT_DAYS} days a "
                    "failed one whose files are there."
                )
            await self._within_limits(connection, job, resumed=True)
            again = {"state": "queued", "wanted": None, "holder": None, "lease_until": 0, "failures": 0}
            await _set(connection, job, **again, error_code=None, kept_until=None, finished_at=None)
            await connection.execute(delete(job_errors).where(job_errors.c.job_id == job.id))
            await _tell(connection, id, [Told(f"queued:{job.tries}", "The job is queued again")])
            await append(connection, caller, "job_resumed", id, request_id=request_id)
            return await self._find(connection, caller, id)

    async def events(self, caller: Caller, id: str, limit: int, after: str | None = None) -> tuple[Sequence[Event], bool]:
        """What happened, newest first, and whether there is more."""
        caller.needs("read")
        async with self.database.reading() as connection:
            job = await self._find(connection, caller, id)
            query = select(*EVENT_COLUMNS).where(job_events.c.job_id == job.id)
            if after is not None:
                query = query.where(job_events.c.number < _number(after, job))
            rows = (await connection.execute(query.order_by(job_events.c.number.desc()).limit(limit + 1))).all()
        return [Event(**row._mapping) for row in rows[:limit]], len(rows) > limit

    async def since(self, job_id: str, number: int, limit: int = 500) -> Sequence[Event]:
        """What happened after an event, in its order."""
        query = select(*EVENT_COLUMNS).where(job_events.c.job_id == job_id, job_events.c.number > number)
        async with self.database.reading() as connection:
            rows = (await connection.execute(query.order_by(job_events.c.number).limit(limit))).all()
        return [Event(**row._mapping) for row in rows]

    async def steps(self, job_id: str) -> dict[int, dict[str, Any]]:
        """What was measured at each step: train_loss, valid_loss, checkpoint (its folder's name)."""
        query = select(job_events.c.key, job_events.c.data, job_events.c.created_at).where(
            job_events.c.job_id == job_id, job_events.c.data.is_not(None)
        )
        found: dict[int, dict[str, Any]] = {}
        async with self.database.reading() as connection:
            for row in await connection.execute(query):
                kind, _, step = row.key.partition(":")
                if kind in ("step", "eval", "checkpoint"):
                    at = {"created_at": row.created_at} if kind == "checkpoint" else {}
                    found.setdefault(int(step), {}).update(row.data, **at)
        return found

    async def error(self, job: Job) -> str | None:
        """Why it failed; None where it did not, or where a file that the sentence may quote is gone."""
        return await self._opened(job_errors, job, _purpose(job.id))

    async def log(self, job: Job) -> str | None:
        """The end of what its run has said; None where that is nothing yet, or where a file that it may quote is gone."""
        return await self._opened(job_logs, job, _log_purpose(job.id))

    async def _opened(self, table: Table, job: Job, purpose: str) -> str | None:
        async with self.database.reading() as connection:
            sealed = (await connection.execute(select(table.c.sealed).where(table.c.job_id == job.id))).scalar()
            if sealed is None:
                return None
            key = await workspace_key(connection, self.store.vault, job.workspace_id)
        return unwrap(key, sealed, purpose).decode()

    async def states(self, ids: builtins.list[str]) -> dict[str, Job]:
        """Those of these jobs that there are."""
        async with self.database.reading() as connection:
            rows = (await connection.execute(select(*COLUMNS).where(jobs.c.id.in_(ids)))).all()
        return {row.id: _job(row) for row in rows}

    async def succeeded(self) -> builtins.list[Job]:
        """Those of all workspaces that have become models."""
        async with self.database.reading() as connection:
            rows = (await connection.execute(select(*COLUMNS).where(jobs.c.state == "succeeded"))).all()
        return [_job(row) for row in rows]

    # -- what a worker does

    async def claim(self) -> Job | None:
        """The next job to run, held by this process: workspaces take turns, and of each the oldest comes first."""
        moment = now()
        free = jobs.c.state.in_(("queued", "running")) & jobs.c.wanted.is_(None) & (jobs.c.lease_until <= moment)
        active = workspaces.c.archived_at.is_(None) & workspaces.c.sealed_key.is_not(None)
        query = select(*COLUMNS).join(workspaces, workspaces.c.id == jobs.c.workspace_id).where(free, active)
        async with self.database.reading() as connection:
            waiting = [_job(row) for row in (await connection.execute(query.order_by(jobs.c.created_at, jobs.c.id))).all()]
        waiting.sort(key=lambda job: (job.workspace_id <= self._last, job.workspace_id))  # stable: the oldest stays first
        full: set[str] = set()
        for job in waiting:
            if job.workspace_id not in full and (claimed := await self._claim(job, full)):
                self._last = job.workspace_id
                failpoint("job.claimed")
                return claimed
        return None

    async def _claim(self, job: Job, full: set[str]) -> Job | None:
        moment = now()
        async with self.database.writing() as connection:
            limits = await self._locked_limits(connection, job)  # so that two processes do not each start its last one
            others = (jobs.c.workspace_id == job.workspace_id) & (jobs.c.state == "running") & (jobs.c.id != job.id)
            if await _count(connection, others & (jobs.c.lease_until > moment)) >= limits.running:
                full.add(job.workspace_id)
                return None
            free = (jobs.c.id == job.id) & jobs.c.state.in_(("queued", "running")) & jobs.c.wanted.is_(None)
            taken = {
                "state": "running",
                "holder": self.holder,
                "lease_until": moment + self.lease,
                "tries": jobs.c.tries + 1,
                "started_at": func.coalesce(jobs.c.started_at, moment),
            }
            done = await connection.execute(update(jobs).where(free, jobs.c.lease_until <= moment).values(taken))
            if not done.rowcount:
                return None
            row = (await connection.execute(select(*COLUMNS).where(jobs.c.id == job.id))).one()
            claimed = _job(row)
            again = claimed.tries > 1
            await _tell(
                connection,
                job.id,
                [Told(f"run:{claimed.tries}", "The job goes on" if again else "The job starts: its files are validated")],
            )
        return claimed

    async def renew(self) -> None:
        """Says that this process is alive."""
        mine = (jobs.c.holder == self.holder) & (jobs.c.state == "running")
        async with self.database.writing() as connection:
            await connection.execute(update(jobs).where(mine).values(lease_until=now() + self.lease))

    async def order(self, job: Job) -> Order | None:
        """Whether a run is to stop, and why."""
        async with self.database.reading() as connection:
            row = (await connection.execute(select(jobs.c.wanted, jobs.c.lease_until).where(_held(job)))).first()
            if row is None or row.lease_until <= now():
                return "lost"
            if row.wanted is not None:
                wanted: Order = row.wanted
                return wanted
            there = files.c.id.in_(job.file_ids) & files.c.expired_at.is_(None)
            count = (await connection.execute(select(func.count()).select_from(files).where(there))).scalar_one()
        return None if count == len(set(job.file_ids)) else "files"

    async def tell(self, job: Job, told: Sequence[Told], **values: Any) -> bool:
        """Writes down what happened, once for each key, and `values` of the job; False where it is no longer held."""
        async with self.database.writing() as connection:
            if not await self.still_held(connection, job):
                return False
            await _tell(connection, job.id, told)
            if values:
                await _set(connection, job, **values)
        return True

    async def end(self, job: Job, state: State, told: Told, error: tuple[str, str] | None = None, **values: Any) -> bool:
        """What came of it, or that it waits again; `error` is its code and its sentence. False where it is no longer held."""
        free = {"holder": None, "lease_until": 0}
        ended: dict[str, Any] = {"finished_at": now(), "wanted": None} if state not in OPEN else {}
        async with self.database.writing() as connection:
            quotes = error is not None and await _may_quote(connection, job)
            if not await self.still_held(connection, job):
                return False
            if error is not None:
                ended["error_code"] = error[0]
                if quotes:
                    await self._keep_error(connection, job, error[1])
            await _set(connection, job, state=state, **{**free, **ended, **values})
            await _tell(connection, job.id, [told])
            if state not in OPEN:
                await append(connection, job.owner, "job_ended", job.id, detail={"state": state, "model": values.get("model")})
            failpoint("job.ending")
        failpoint("job.ended")
        return True

    async def keep_log(self, job: Job, text: str) -> None:
        """The end of what its run has said, for servers that do not run it; it goes with the files, which it may quote."""
        async with self.database.writing() as connection:
            if not await _may_quote(connection, job) or not await self.still_held(connection, job):
                return
            key = await workspace_key(connection, self.store.vault, job.workspace_id)
            row = {**_quoting(job), "sealed": wrap(key, text.encode(), _log_purpose(job.id))}
            new = self.database.upsert(job_logs).values(row)
            await connection.execute(new.on_conflict_do_update(index_elements=["job_id"], set_={"sealed": row["sealed"]}))

    # -- what time does

    async def settle(self) -> Sequence[Job]:
        """Ends what was cancelled or paused while whoever held it died, what has lost its files, and what a failed one keeps once it
        has, or for too long; those that came to their end."""
        moment = now()
        idle = (jobs.c.state.in_(OPEN) & (jobs.c.lease_until <= moment)) | jobs.c.kept_until.is_not(None)
        async with self.database.reading() as connection:
            rows = (await connection.execute(select(*COLUMNS).where(idle))).all()
            ids = {id for row in rows for id in _job(row).file_ids}
            alive = files.c.id.in_(ids) & files.c.expired_at.is_(None)
            there = set((await connection.execute(select(files.c.id).where(alive))).scalars()) if ids else set()
        ended: builtins.list[Job] = []
        for job in map(_job, rows):
            gone = not set(job.file_ids) <= there
            if job.kept_until is not None:
                if (gone or job.kept_until <= moment) and await self._give_up(job):
                    ended.append(job)
            elif gone or job.wanted is not None:
                async with self.database.writing() as connection:
                    row = (await connection.execute(select(*COLUMNS).where(jobs.c.id == job.id).with_for_update())).first()
                    if row is None or row.lease_until > moment or row.state not in OPEN:
                        continue
                    await self._stop(connection, _job(row), "cancel" if gone else job.wanted, gone=gone)
                ended.append(job)
        return ended

    async def _give_up(self, job: Job) -> bool:
        """A failed job can not be resumed any more; False where somebody else has said so, or it has been."""
        same = (jobs.c.id == job.id) & (jobs.c.kept_until == job.kept_until)
        async with self.database.writing() as connection:
            return bool((await connection.execute(update(jobs).where(same).values(kept_until=None))).rowcount)

    async def _stop(self, connection: AsyncConnection, job: Job, wanted: str | None, *, gone: bool = False) -> None:
        """Ends or pauses a job that nobody holds."""
        values: dict[str, Any] = {"holder": None, "lease_until": 0, "wanted": None}
        if wanted == "pause":
            await _set(connection, job, state="paused", **values)
            await _tell(connection, job.id, [Told(f"paused:{job.tries}:{job.step}", "The job is paused")])
            return
        await _set(connection, job, state="cancelled", finished_at=now(), **values)
        await _tell(connection, job.id, [FILES_GONE if gone else CANCELLED])
        await append(connection, job.owner, "job_ended", job.id, detail={"state": "cancelled", "model": None})

    async def still_held(self, connection: AsyncConnection, job: Job) -> bool:
        """Whether this process holds it, and does until the transaction ends."""
        row = (await connection.execute(select(jobs.c.id).where(_held(job)).with_for_update())).first()
        return row is not None and self.holder == job.holder

    async def _keep_error(self, connection: AsyncConnection, job: Job, text: str) -> None:
        key = await workspace_key(connection, self.store.vault, job.workspace_id)
        await connection.execute(insert(job_errors).values(**_quoting(job), sealed=wrap(key, text.encode(), _purpose(job.id))))

    async def _within_limits(self, connection: AsyncConnection, job: Job, *, resumed: bool = False) -> None:
        limits = await self._locked_limits(connection, job)
        counted = ("queued", "running") if resumed and job.state == "paused" else OPEN
        mine = (jobs.c.workspace_id == job.workspace_id) & jobs.c.state.in_(counted)
        query = select(func.count(), func.coalesce(func.sum(jobs.c.file_bytes), 0)).where(mine)
        count, size = (await connection.execute(query)).one()
        if count >= limits.queued:
            raise QuotaExceeded(
                f"this workspace has {count} jobs that have not ended, of {limits.queued}; wait for one, or cancel one"
            )
        if size + job.file_bytes > limits.file_bytes:
            raise QuotaExceeded(
                f"the files of this workspace's open jobs would have {size + job.file_bytes:,} bytes, of {limits.file_bytes:,}; "
                "wait for a job to end, or train on less"
            )

    async def _locked_limits(self, connection: AsyncConnection, job: Job) -> Limits:
        """What a job's workspace may have at a time, by its own settings or else the server's; the workspace is locked."""
        own = [workspaces.c[name] for name in OF_JOBS]
        row = (await connection.execute(select(*own).where(workspaces.c.id == job.workspace_id).with_for_update())).one()
        usual = self.limits
        return Limits(*(theirs if theirs is not None else ours for theirs, ours in zip(row, astuple(usual), strict=True)))

    async def _find(self, connection: AsyncConnection, caller: Caller, id: str, *, lock: bool = False) -> Job:
        row = None
        if id.isascii() and id.isprintable() and len(id) <= 128:
            query = select(*COLUMNS).where(jobs.c.id == id, _visible(caller))
            row = (await connection.execute(query.with_for_update() if lock else query)).first()
        if row is None:
            raise NotFound(f"Fine-tuning job `{id[:128]}` not found.")
        return _job(row)


_DONE = {"pause": "paused", "cancel": "cancelled"}
CANCELLED = Told("cancelled", "The job has been cancelled")
FILES_GONE = Told(
    "cancelled", "The job has been cancelled: a file that it learns from was deleted or has expired", level="warn"
)


def _visible(caller: Caller) -> ColumnElement[bool]:
    mine = jobs.c.workspace_id == caller.workspace_id
    return mine if caller.user_id is None else mine & (jobs.c.user_id == caller.user_id)


def _held(job: Job) -> ColumnElement[bool]:
    """The job in this try of this process; another try is another run."""
    return (jobs.c.id == job.id) & (jobs.c.holder == job.holder) & (jobs.c.tries == job.tries) & (jobs.c.state == "running")


async def _set(connection: AsyncConnection, job: Job, **values: Any) -> None:
    await connection.execute(update(jobs).where(jobs.c.id == job.id).values(**values))


async def _tell(connection: AsyncConnection, job_id: str, told: Sequence[Told]) -> None:
    """Under the lock of the job's row, so that numbers are in order; what was told before is not told again."""
    if not told:
        return
    known = select(job_events.c.key).where(job_events.c.job_id == job_id, job_events.c.key.in_([one.key for one in told]))
    seen = set((await connection.execute(known)).scalars())
    last = select(func.coalesce(func.max(job_events.c.number), 0)).where(job_events.c.job_id == job_id)
    number, moment = (await connection.execute(last)).scalar_one(), now()
    rows = []
    for one in told:
        if one.key not in seen:
            seen.add(one.key)
            number += 1
            rows.append({**one._asdict(), "job_id": job_id, "number": number, "created_at": moment})
    if rows:
        await connection.execute(insert(job_events), rows)


async def _count(connection: AsyncConnection, where: ColumnElement[bool]) -> int:
    return int((await connection.execute(select(func.count()).select_from(jobs).where(where))).scalar_one())


def _number(event_id: str, job: Job) -> int:
    head, _, number = event_id.rpartition("_")
    if head != f"ftevent_{job.id.partition('_')[2]}" or not number.isdecimal() or len(number) > 9:
        raise NotFound(f"Event `{event_id[:128]}` not found.")
    return int(number)


async def _may_quote(connection: AsyncConnection, job: Job) -> bool:
    """Whether its files are there, and are until the transaction ends: they are looked up before the job's row is taken, as everywhere."""
    alive = files.c.id.in_(job.file_ids) & files.c.expired_at.is_(None)
    there = (await connection.execute(select(files.c.id).where(alive).order_by(files.c.id).with_for_update())).all()
    return len(there) == len(set(job.file_ids))


def _quoting(job: Job) -> dict[str, Any]:
    """The keys of a row that goes with the job's files."""
    return {
        "job_id": job.id,
        "made_as": MADE_AS,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
    }


def _purpose(id: str) -> str:
    return f"job {id}"


def _log_purpose(id: str) -> str:
    return f"job log {id}"


def _job(row: Any) -> Job:
    return Job(**{field.name: getattr(row, field.name) for field in fields(Job)})
