"""What other servers of the same installation have done, as far as this one must follow: a file that was deleted there is forgotten here."""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy import func, select

from ropewalk.engine.models import Models
from ropewalk.files.store import Store
from ropewalk.files.tables import deletions
from ropewalk.server import logs

LOOK_SECONDS = 2.0  # at the receipts
EXPIRED_SECONDS = 60.0  # files that expire have none


async def follow(store: Store, models: Models) -> None:
    """Follows until it is cancelled."""
    seen, looked_at = 0, 0.0
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            async with store.database.reading() as connection:
                last = (await connection.execute(select(func.coalesce(func.max(deletions.c.seq), 0)))).scalar_one()
            if last != seen or time.monotonic() >= looked_at + EXPIRED_SECONDS:
                await models.forget_gone()
                seen, looked_at = last, time.monotonic()
        except Exception as error:  # the next look tries again
            logs.event("follow_failed", logging.ERROR, error)
