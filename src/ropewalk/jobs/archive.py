"""What of a job's run lies in the blob store, so that any server can go on with it, and serve what came of it.

step-00000020     a checkpoint without its optimizer: a model, once the job has succeeded
resume-00000020   what a run that goes on from that checkpoint needs besides; holds words of the files, and dies with them
adapter           the finished adapter

What is kept is written only by whoever holds the job at that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.files.archives import Guard, Kept
from ropewalk.files.packing import unpack
from ropewalk.jobs.ledger import Job, Ledger

KIND = "job_state"  # among what was made from a file
STATE = "optimizer.pt"
RECORD = "run.json"
CHECKPOINT, RESUME, ADAPTER = "step-", "resume-", "adapter"


class JobArchive:
    """The kept runs of all jobs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._archives = ledger, ledger.store.archives

    async def keep_checkpoints(self, job: Job, run: Path) -> bool:
        """Keeps what is new among the checkpoints of a run's folder, and drops what it has dropped; False where it is held no more."""
        steps = await asyncio.to_thread(steps_of, run)
        newest = await asyncio.to_thread(newest_in, run, steps)
        kept = await self._archives.find(job.id)
        for step in reversed(steps):  # the newest first: a fast run removes the old ones meanwhile
            with suppress(FileNotFoundError):
                if model_name(step) not in kept and not await self._keep(job, model_name(step), run, model_paths(run, step)):
                    return False
                if step == newest and newest > newest_of(kept):
                    state = resume_paths(run, newest)
                    if not await self._keep(job, resume_name(newest), run, state, job.file_ids):
                        return False
        await self._tidy(job, steps)
        return True

    async def keep_adapter(self, job: Job, run: Path) -> bool:
        """Keeps the finished adapter and all checkpoints; QuotaExceeded where there is no room, False where the job is held no more."""
        if not await self.keep_checkpoints(job, run):
            return False
        return await self._keep(job, ADAPTER, run, (ADAPTER, RECORD))

    async def bring(self, job: Job, run: Path) -> bool:
        """Puts what is kept into a run's folder, if that is further than what lies there; whether it was."""
        kept = await self._archives.find(job.id)
        there = await asyncio.to_thread(lambda: newest_in(run, steps_of(run)))
        if ADAPTER in kept and not (run / ADAPTER).is_dir():
            names = [name for name in kept if not name.startswith(RESUME)]
        elif (newest := newest_of(kept)) > there:
            names = [name for name in kept if name.startswith(CHECKPOINT) and name <= model_name(newest)] + [
                resume_name(newest)
            ]
            # What was kept after it will be made again.
            await self._archives.drop(
                job.id, [name for name in kept if name.startswith(CHECKPOINT) and name > model_name(newest)]
            )
        else:
            return False
        for name in names:
            await self.bring_one(job.id, name, run)
        return True

    async def bring_one(self, job_id: str, name: str, run: Path) -> bool:
        """Puts one archive into a run's folder; False where there is none of that name."""
        ticket = await self._archives.ticket(job_id, name)
        if ticket is None:
            return False
        await asyncio.to_thread(unpack, ticket, run)
        return True

    async def steps(self, job_id: str) -> list[int]:
        """The checkpoints that are kept."""
        return [int(name.removeprefix(CHECKPOINT)) for name in await self._archives.find(job_id) if name.startswith(CHECKPOINT)]

    async def has_adapter(self, job_id: str) -> bool:
        return ADAPTER in await self._archives.find(job_id)

    async def drop(self, job_id: str) -> None:
        """Erases all of a job's."""
        await self._archives.drop(job_id)

    async def drop_resumable(self, job_id: str) -> None:
        """Erases what only an unfinished run needs."""
        await self._archives.drop(job_id, [name for name in await self._archives.find(job_id) if name.startswith(RESUME)])

    async def _keep(self, job: Job, name: str, run: Path, paths: Sequence[str], of: Sequence[str] = ()) -> bool:
        return await self._archives.keep(job.owner, job.id, name, run, paths, of, KIND, self._guard(job))

    async def _tidy(self, job: Job, steps: Sequence[int]) -> None:
        """Drops older states, and checkpoints that the run itself has removed."""
        kept = await self._archives.find(job.id)
        old = [name for name in kept if name.startswith(RESUME) and name != resume_name(newest_of(kept))]
        there = {model_name(step) for step in steps}
        old += [name for name in kept if name.startswith(CHECKPOINT) and name not in there]
        if old:
            await self._archives.drop(job.id, old)

    def _guard(self, job: Job) -> Guard:
        async def held(connection: AsyncConnection) -> bool:
            return await self._ledger.still_held(connection, job)

        return held


def model_name(step: int) -> str:
    """The name of a checkpoint's archive, and of its folder."""
    return f"{CHECKPOINT}{step:08d}"


def resume_name(step: int) -> str:
    return f"{RESUME}{step:08d}"


def steps_of(run: Path) -> list[int]:
    """The checkpoints in a run's folder, oldest first."""
    found = (path for path in (run / "checkpoints").glob(f"{CHECKPOINT}*") if (path / "adapter_config.json").is_file())
    return sorted(int(path.name.removeprefix(CHECKPOINT)) for path in found)


def model_paths(run: Path, step: int) -> list[str]:
    """What of a run's folder is a checkpoint without its optimizer; FileNotFoundError where the run has removed it."""
    folder = run / "checkpoints" / model_name(step)
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    return sorted(str(path.relative_to(run)) for path in folder.rglob("*") if path.is_file() and path.name != STATE)


def resume_paths(run: Path, step: int) -> list[str]:
    """What a run that goes on from a checkpoint needs besides."""
    beside = [name for name in (RECORD, "events.jsonl") if (run / name).exists()]
    return [f"checkpoints/{model_name(step)}/{STATE}", *beside]


def newest_of(kept: Mapping[str, Kept]) -> int:
    """The step that can be gone on from; -1 where there is none."""
    return max((int(name.removeprefix(RESUME)) for name in kept if name.startswith(RESUME)), default=-1)


def newest_in(run: Path, steps: Sequence[int]) -> int:
    """The last of some checkpoints that a run's folder can be gone on from; -1 where there is none."""
    return max((step for step in steps if (run / "checkpoints" / model_name(step) / STATE).exists()), default=-1)
