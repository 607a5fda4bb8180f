"""What other servers of the same installation have done, as far as this one must follow: a file that was deleted there is forgotten here."""

from __future__ import annotations

import asyncio
import json
import logging
import time

from sqlalchemy import func, select

from ropewalk.engine.models import Models
from ropewalk.files.store import Store
from ropewalk.files.tables import deletions
from ropewalk.server import logs

LOOK_SECONDS = 2.0  # at new receipts, which name a file by the digest of its id
EXPIRED_SECONDS = 60.0  # files that expire have none
MOST = 1000  # receipts of one look


async def follow(store: Store, models: Models) -> None:
    """Follows until it is cancelled."""
    seen, looked_at = -1, time.monotonic()
    while True:
        try:
            if seen < 0:  # nothing has been read here yet of what was deleted before
                seen = await _last(store)
            elif new := await _since(store, seen):
                await models.forget_gone({digest for _, digest in new})
                seen = new[-1][0]
            if time.monotonic() >= looked_at + EXPIRED_SECONDS:
                await models.forget_gone()
                looked_at = time.monotonic()
        except Exception as error:  # the next look tries again
            logs.event("follow_failed", logging.ERROR, error)
        await asyncio.sleep(LOOK_SECONDS)


async def _last(store: Store) -> int:
    async with store.database.reading() as connection:
        return int((await connection.execute(select(func.coalesce(func.max(deletions.c.seq), 0)))).scalar_one())


async def _since(store: Store, seq: int) -> list[tuple[int, str]]:
    query = select(deletions.c.seq, deletions.c.receipt).where(deletions.c.seq > seq).order_by(deletions.c.seq).limit(MOST)
    async with store.database.reading() as connection:
        return [(row.seq, json.loads(row.receipt)["file_id_sha256"]) for row in await connection.execute(query)]
