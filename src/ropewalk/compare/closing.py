"""The end of a workspace: all that was compared in it is forgotten."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Table, delete, select

from ropewalk.compare import tables
from ropewalk.database import Database

# In the order in which they can go; what refers to one of them with ON DELETE CASCADE goes along.
ENDING: tuple[Table, ...] = (
    *(tables.digests, tables.subscribers, tables.bookmarks, tables.promotions, tables.votes, tables.verdicts, tables.claims),
    *(
        tables.comparisons,
        tables.judges,
        tables.voters,
        tables.measurements,
        tables.runs,
        tables.suites,
        tables.candidates,
        tables.prices,
    ),
)
OWNER = {"comparison_id": tables.comparisons, "candidate_id": tables.candidates}  # of rows that name no workspace


async def forget(database: Database, workspace_id: str) -> None:
    """Drops everything of a workspace that is no more."""
    async with database.writing() as connection:
        for table in ENDING:
            await connection.execute(delete(table).where(_of(table, workspace_id)))


def _of(table: Table, workspace_id: str) -> ColumnElement[bool]:
    if "workspace_id" in table.c:
        return table.c.workspace_id == workspace_id
    name = next(name for name in OWNER if name in table.c)
    owners = OWNER[name].c
    return table.c[name].in_(select(owners.id).where(owners.workspace_id == workspace_id))
