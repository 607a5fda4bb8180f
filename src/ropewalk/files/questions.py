"""Question jobs as they are written down: a batch that a model answers, and the file that its answers become.

create     the job's row and its ties to the file, then the batch: what quotes a file goes with it
claim      a lease on a job whose batch has ended; gathering again after a crash finds what was gathered before
end        the file, or why there is none
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import delete, insert, select, update

from ropewalk.batches.tables import batches
from ropewalk.database import now
from ropewalk.errors import NotFound
from ropewalk.files import catalog
from ropewalk.files.store import Store
from ropewalk.files.tables import BATCHES, FILES, derived, erasures, question_jobs
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

KIND = "questions"
LEASE = 120 * 1_000_000
LOST = 600 * 1_000_000  # a job without a batch after so long was cut short before it had one, or somebody has deleted it


@dataclass(frozen=True)
class QuestionJob:
    """One job, and how far it is."""

    id: str
    file_id: str
    batch_id: str
    state: str
    wanted: Mapping[str, Any]
    chunks: int
    rows: int
    dropped: int
    output_file_id: str | None
    error: str | None
    created_at: int
    ended_at: int | None


COLUMNS = [question_jobs.c[field.name] for field in fields(QuestionJob)]


async def create(store: Store, caller: Caller, file_id: str, wanted: Mapping[str, Any], chunks: int) -> QuestionJob:
    """Writes down that the answers of a batch, which is to be made next under the id it is given, are to become a file."""
    moment, batch_id = now(), new_id("msgbatch")
    made = QuestionJob(new_id("qjob"), file_id, batch_id, "in_progress", wanted, chunks, 0, 0, None, None, moment, None)
    async with store.database.writing() as connection:
        await catalog.find(connection, caller, file_id)
        await store.keep_rows(connection, file_id, KIND, made.id)
        tie = {"owner": file_id, "kind": KIND, "name": batch_id, "place": BATCHES, "stored": batch_id, "size": 0}
        await connection.execute(insert(derived).values(**tie, created_at=moment))
        row = {field.name: getattr(made, field.name) for field in fields(QuestionJob)}
        await connection.execute(insert(question_jobs).values(**row, made_as=KIND, lease_until=0))
    return made


async def show(store: Store, caller: Caller, file_id: str, id: str) -> QuestionJob:
    """One job; NotFound also for another's."""
    found = [job for job in await of_file(store, caller, file_id) if job.id == id]
    if not found:
        raise NotFound(f"Question job `{id[:128]}` not found.")
    return found[0]


async def of_file(store: Store, caller: Caller, file_id: str) -> list[QuestionJob]:
    """The jobs of a file, newest first; NotFound for another's file."""
    caller.needs("read")
    async with store.database.reading() as connection:
        await catalog.find(connection, caller, file_id)
        query = select(*COLUMNS).where(question_jobs.c.file_id == file_id)
        rows = await connection.execute(query.order_by(question_jobs.c.created_at.desc(), question_jobs.c.id.desc()))
        return [_job(row) for row in rows]


async def unfinished(store: Store) -> int:
    """How many jobs there are whose answers are to be waited for."""
    async with store.database.reading() as connection:
        found = await connection.execute(select(question_jobs.c.id).where(question_jobs.c.state == "in_progress"))
        return len(found.all())


async def claim(store: Store) -> QuestionJob | None:
    """A job whose batch has ended, and that nobody gathers."""
    moment = now()
    free = (question_jobs.c.state == "in_progress") & (question_jobs.c.lease_until <= moment)
    same = batches.c.id == question_jobs.c.batch_id
    over = select(batches.c.id).where(same, batches.c.ended_at.is_not(None)).exists()
    gone = ~select(batches.c.id).where(same).exists() & (question_jobs.c.created_at <= moment - LOST)
    query = select(*COLUMNS).where(free, over | gone).order_by(question_jobs.c.created_at).limit(1)
    async with store.database.reading() as connection:
        row = (await connection.execute(query)).first()
    if row is None:
        return None
    async with store.database.writing() as connection:
        taken = update(question_jobs).where(question_jobs.c.id == row.id, free).values(lease_until=moment + LEASE)
        return _job(row) if (await connection.execute(taken)).rowcount else None


async def made_before(store: Store, job: QuestionJob) -> str | None:
    """The file that the answers became, where a process died before it wrote that down."""
    async with store.database.reading() as connection:
        tie = select(derived.c.stored).where(
            derived.c.owner == job.file_id, derived.c.kind == KIND, derived.c.name == name_of(job), derived.c.place == FILES
        )
        return (await connection.execute(tie)).scalar()


def name_of(job: QuestionJob) -> str:
    """What the file of a job is tied to its source by."""
    return f"rows of {job.id}"


async def end(
    store: Store, job: QuestionJob, *, rows: int, dropped: int, output_file_id: str | None, error: str | None = None
) -> None:
    """Writes down what came of a job; its batch, which says the same once more, goes."""
    doomed = {"place": BATCHES, "stored": job.batch_id}
    told = {"rows": rows, "dropped": dropped, "output_file_id": output_file_id, "error": error, "ended_at": now()}
    async with store.database.writing() as connection:
        state = "failed" if output_file_id is None else "succeeded"
        await connection.execute(update(question_jobs).where(question_jobs.c.id == job.id).values(state=state, **told))
        tie = (derived.c.owner == job.file_id) & (derived.c.kind == KIND) & (derived.c.name == job.batch_id)
        await connection.execute(delete(derived).where(tie))
        await connection.execute(store.database.upsert(erasures).on_conflict_do_nothing(), [doomed])
    await store.erase([(BATCHES, job.batch_id)])


def _job(row: Any) -> QuestionJob:
    return QuestionJob(**{field.name: getattr(row, field.name) for field in fields(QuestionJob)})
