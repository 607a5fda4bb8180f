"""Bytes and files in use, and their limits: exact, however many ask at once.

An upload first reserves what it may need, by one conditional UPDATE per scope, and settles to what it took. The scopes are always
visited in the same order, so that two transactions never wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.errors import QuotaExceeded
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import usage as table


@dataclass(frozen=True)
class Usage:
    """What a scope uses; limits are None where there is none."""

    used_bytes: int = 0
    reserved_bytes: int = 0
    used_files: int = 0
    reserved_files: int = 0
    limit_bytes: int | None = None
    limit_files: int | None = None


def scopes(caller: Caller) -> list[tuple[str, str]]:
    """What this caller's bytes count against."""
    found = [("organization", caller.organization_id), ("workspace", caller.workspace_id)]
    if caller.key_id:
        found.append(("key", caller.key_id))
    if caller.user_id:
        found.append(("user", f"{caller.workspace_id}/{caller.user_id}"))
    return found


async def reserve(connection: AsyncConnection, caller: Caller, size: int, files: int = 1) -> None:
    """Sets bytes and files aside in every scope, or raises QuotaExceeded (the transaction must then be undone)."""
    for scope, id in scopes(caller):
        room = (table.c.limit_bytes.is_(None) | (table.c.used_bytes + table.c.reserved_bytes + size <= table.c.limit_bytes)) & (
            table.c.limit_files.is_(None) | (table.c.used_files + table.c.reserved_files + files <= table.c.limit_files)
        )
        added = {
            "reserved_bytes": table.c.reserved_bytes + size,
            "reserved_files": table.c.reserved_files + files,
        }
        if not (await connection.execute(_at(scope, id).where(room).values(added))).rowcount:
            await _ensure(connection, scope, id)
            if not (await connection.execute(_at(scope, id).where(room).values(added))).rowcount:
                raise _full(await usage(connection, scope, id), scope, size)


async def settle(connection: AsyncConnection, caller: Caller, reserved: int, size: int, files: int = 1) -> None:
    """Turns what was reserved into what is used."""
    await _change(connection, caller, reserved_bytes=-reserved, reserved_files=-files, used_bytes=size, used_files=files)


async def release(connection: AsyncConnection, caller: Caller, size: int, files: int = 1, *, reserved: bool = False) -> None:
    """Gives back what was used, or what was only reserved."""
    if reserved:
        await _change(connection, caller, reserved_bytes=-size, reserved_files=-files)
    else:
        await _change(connection, caller, used_bytes=-size, used_files=-files)


async def usage(connection: AsyncConnection, scope: str, id: str) -> Usage:
    """What a scope uses now."""
    row = (await connection.execute(select(table).where(table.c.scope == scope, table.c.id == id))).mappings().first()
    return Usage(**{name: row[name] for name in Usage.__dataclass_fields__}) if row else Usage()


async def set_limit(connection: AsyncConnection, scope: str, id: str, limit_bytes: int | None, limit_files: int | None) -> None:
    """Sets both limits of a scope; what is over a new limit stays, and nothing is added."""
    await _ensure(connection, scope, id)
    await connection.execute(_at(scope, id).values(limit_bytes=limit_bytes, limit_files=limit_files))


async def _change(connection: AsyncConnection, caller: Caller, **by: int) -> None:
    for scope, id in scopes(caller):
        await connection.execute(_at(scope, id).values({name: table.c[name] + amount for name, amount in by.items()}))


async def _ensure(connection: AsyncConnection, scope: str, id: str) -> None:
    insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)
    await connection.execute(insert.values(scope=scope, id=id).on_conflict_do_nothing())


def _at(scope: str, id: str) -> Any:
    return update(table).where(table.c.scope == scope, table.c.id == id)


def _full(now: Usage, scope: str, size: int) -> QuotaExceeded:
    if scope == "organization":  # what others use is not the caller's to know
        return QuotaExceeded("Storage quota exceeded: the organization has no room for this. Ask for a higher limit.")
    if now.limit_bytes is not None and now.used_bytes + now.reserved_bytes + size > now.limit_bytes:
        return QuotaExceeded(
            f"Storage quota exceeded: the {scope} may hold {now.limit_bytes:,} bytes, {now.used_bytes + now.reserved_bytes:,} are "
            f"taken, and this needs {size:,}. Delete files, or ask for a higher limit."
        )
    return QuotaExceeded(
        f"Storage quota exceeded: the {scope} may hold {now.limit_files:,} files, and {now.used_files + now.reserved_files:,} are "
        f"there. Delete files, or ask for a higher limit."
    )
