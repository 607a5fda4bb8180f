"""Files read ahead for a model that is about to be served, since they have been read for the one that it comes after."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from sqlalchemy import select

from ropewalk.engine.models import Models
from ropewalk.errors import Overloaded, RopewalkError
from ropewalk.files.store import Store
from ropewalk.files.tables import derived, file_token_days, files
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import workspaces

MOST = 200  # files; those asked about last
TRIES = 40  # of a model that is busy

log = logging.getLogger("ropewalk.compare")


async def prefill(
    store: Store, models: Models, names: Sequence[str], target: str, progress: Callable[[float], None] = lambda share: None
) -> int:
    """Reads for the model `target` what has been read for those names, each file in the name of its own workspace -> how many."""
    await models.ledger.flush()
    found, read = await read_before(store, names), 0
    for number, (caller, file_id) in enumerate(found, 1):
        read += await _warmed(models, caller, target, file_id)
        progress(number / len(found))
    return read


async def read_before(store: Store, names: Sequence[str]) -> Sequence[tuple[Caller, str]]:
    """Files that were asked about by one of these names, and of which a model still keeps what it read; the last asked first."""
    kept = select(derived.c.owner).where(derived.c.kind == "kv")
    asked = select(file_token_days.c.file_id, file_token_days.c.day).where(file_token_days.c.model.in_(names)).subquery()
    query = (
        select(files.c.id, files.c.workspace_id, workspaces.c.organization_id, asked.c.day)
        .join(asked, asked.c.file_id == files.c.id)
        .join(workspaces, workspaces.c.id == files.c.workspace_id)
        .where(files.c.expired_at.is_(None), workspaces.c.archived_at.is_(None), files.c.id.in_(kept))
        .order_by(asked.c.day.desc(), files.c.created_at.desc())
    )
    async with store.database.reading() as connection:
        rows = (await connection.execute(query)).all()
    found: dict[str, Caller] = {}
    for row in rows:
        found.setdefault(row.id, Caller(row.organization_id, row.workspace_id, None))
    return [(caller, id) for id, caller in list(found.items())[:MOST]]


async def _warmed(models: Models, caller: Caller, target: str, file_id: str) -> bool:
    for attempt in range(TRIES):
        try:
            await models.warm(caller, target, file_id)
            return True
        except Overloaded as error:
            if attempt + 1 == TRIES:
                raise
            await asyncio.sleep(error.retry_after)
        except RopewalkError as error:  # deleted meanwhile, or longer than can be read at once: a question will see
            log.info("%s is not read ahead: %s", file_id, type(error).__name__)
            break
    return False
