"""The end of a workspace: its jobs are forgotten. A run that is under way notices that it is nobody's and ends."""

from __future__ import annotations

from sqlalchemy import delete

from ropewalk.database import Database
from ropewalk.jobs.tables import jobs


async def forget(database: Database, workspace_id: str) -> None:
    """Drops all jobs of a workspace that is no more; their events go along."""
    async with database.writing() as connection:
        await connection.execute(delete(jobs).where(jobs.c.workspace_id == workspace_id))
