"""The end of a workspace: every file in it deleted with its receipt, and then the key without which none of it can be read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias

from sqlalchemy import Select, Table, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.batches.ledger import forget as forget_batches
from ropewalk.database import Database, now
from ropewalk.errors import NotFound
from ropewalk.files import resumable
from ropewalk.files.receipts import Receipt
from ropewalk.files.store import Store
from ropewalk.files.tables import files, resumables, uploads
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import archive_workspace, destroy_workspace_key, find_workspace

Forget: TypeAlias = Callable[[Database, str], Awaitable[None]]

PAGE = 100
LOOK_AGAIN_SECONDS = 0.2


async def delete_workspace(store: Store, id_or_name: str, forget: Iterable[Forget] = ()) -> AsyncIterator[Receipt]:
    """Archives a workspace, so that nobody adds to it, and erases all it has; may be cut short at any point and run again.

    `forget` are those who drop what rooms above this one keep of a workspace.
    """
    workspace = await archive_workspace(store.database, id_or_name)
    caller = Caller(workspace.organization_id, workspace.id, None)
    while True:
        async with store.database.reading() as connection:
            ids = (await connection.execute(_of(workspace.id, files))).scalars().all()
            begun = (await connection.execute(_of(workspace.id, resumables))).scalars().all()
            busy = await _in_flight(connection, workspace.id)
        for id in begun:
            await resumable.terminate(store, caller, id)
        for id in ids:
            try:
                yield await store.delete(caller, id)
            except NotFound:  # somebody else's deletion was first
                continue
        if not ids and not begun:
            if not busy:
                break
            await asyncio.sleep(LOOK_AGAIN_SECONDS)  # admitted before the workspace was archived: they end, or their leases do
    for drop in (forget_batches, *forget):
        await drop(store.database, workspace.id)
    await store.archives.drop_workspace(workspace.id)
    await destroy_workspace_key(store.database, workspace.id)


async def files_of(store: Store, id_or_name: str) -> int:
    """How many files a workspace has."""
    async with store.database.reading() as connection:
        workspace = await find_workspace(connection, id_or_name)
        count = select(func.count()).select_from(files).where(files.c.workspace_id == workspace.id)
        return int((await connection.execute(count)).scalar_one())


def _of(workspace_id: str, table: Table) -> Select[Any]:
    return select(table.c.id).where(table.c.workspace_id == workspace_id).limit(PAGE)


async def _in_flight(connection: AsyncConnection, workspace_id: str) -> bool:
    alive = select(uploads.c.id).where(uploads.c.workspace_id == workspace_id, uploads.c.lease_until > now()).limit(1)
    return (await connection.execute(alive)).first() is not None
