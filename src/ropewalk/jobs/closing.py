"""The end of a workspace: its jobs are forgotten, and the models that they made. A run that is under way notices that it is nobody's
and ends; what has been kept of it goes with the workspace's archives, and what lies on other servers, by their own looks at it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from sqlalchemy import delete

from ropewalk.database import Database
from ropewalk.jobs.tables import jobs
from ropewalk.registry import Registry


def forgetting(registry: Registry, data: Path) -> Callable[[Database, str], Awaitable[None]]:
    """What drops all jobs of a workspace that is no more, with their events, and their models from the registry."""

    async def forget(database: Database, workspace_id: str) -> None:
        await asyncio.to_thread(registry.withdraw, "workspace", workspace_id)
        async with database.writing() as connection:
            gone = await connection.execute(delete(jobs).where(jobs.c.workspace_id == workspace_id).returning(jobs.c.id))
            ids = list(gone.scalars())
        for id in ids:
            await asyncio.to_thread(shutil.rmtree, data / "jobs" / id, ignore_errors=True)

    return forget
