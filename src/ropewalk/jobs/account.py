"""What jobs have trained, and how long they held devices, by day, base and workspace: for the report of what is used."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import func, select

from ropewalk.database import Database, now
from ropewalk.jobs.tables import jobs
from ropewalk.tenants.token_report import Trained

DAY = 86_400_000_000  # microseconds


async def trained(database: Database, first: str, workspace_id: str | None, user_id: str | None) -> list[Trained]:
    """Jobs that have begun, each on the day on which it ended, UTC, from `first` on; one that has not ended counts for today."""
    since = round(datetime.fromisoformat(first).replace(tzinfo=UTC).timestamp()) * 1_000_000
    moment = func.coalesce(jobs.c.finished_at, now())
    day = (moment // DAY).label("day")
    sums = [
        func.count().label("jobs"),
        func.coalesce(func.sum(jobs.c.trained_tokens), 0).label("tokens"),
        func.sum(jobs.c.device_time).label("device_time"),
    ]
    which = [jobs.c.tries > 0, moment >= since]
    if workspace_id is not None:
        which.append(jobs.c.workspace_id == workspace_id)
    if user_id is not None:
        which.append(jobs.c.user_id == user_id)
    by = day, jobs.c.base, jobs.c.workspace_id
    async with database.reading() as connection:
        rows = (await connection.execute(select(*by, *sums).where(*which).group_by(*by).order_by(*by))).all()
    return [
        Trained(
            datetime.fromtimestamp(int(row.day) * DAY / 1e6, UTC).date().isoformat(),
            row.base,
            row.workspace_id,
            int(row.jobs),
            int(row.tokens),
            int(row.device_time) / 1e6,
        )
        for row in rows
    ]
