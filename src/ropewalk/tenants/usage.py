"""What organisation, workspaces, keys and users use, and what they may: seen and set by whoever administers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import Database
from ropewalk.errors import BadInput
from ropewalk.tenants.audit import append
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.keys import check_user_id, find_key
from ropewalk.tenants.quotas import Usage, set_limit, usage
from ropewalk.tenants.tables import usage as table
from ropewalk.tenants.workspaces import DEFAULT, PAGE, Workspace, acting, check_limit, find_workspace, organization

# The limits of `new_workspaces` are those that a workspace begins with; it uses nothing itself.
SCOPES = ("organization", "workspace", "key", "user", "new_workspaces")
LIMITS = ("limit_bytes", "limit_files")


@dataclass(frozen=True)
class Share:
    """What one of SCOPES uses and may use. A user's id is WORKSPACE/USER."""

    scope: str
    id: str
    usage: Usage


async def share_of(database: Database, scope: str, id: str | None) -> Share:
    """The usage of one; NotFound when there is no such workspace or key."""
    async with database.reading() as connection:
        found, _ = await _find(connection, scope, id)
        return Share(scope, found, await usage(connection, _kept_as(scope), found))


async def largest(database: Database, scope: str, limit: int = PAGE) -> list[Share]:
    """Those of a scope that use most, largest first."""
    _check_scope(scope)
    if scope in ("organization", "new_workspaces"):
        return [await share_of(database, scope, None)]
    async with database.reading() as connection:
        organization_id, _ = await organization(connection)
        query = select(table).where(table.c.scope == scope, table.c.id != organization_id)
        rows = await connection.execute(query.order_by(table.c.used_bytes.desc(), table.c.id).limit(limit))
        return [Share(scope, row["id"], Usage(**{f.name: row[f.name] for f in fields(Usage)})) for row in rows.mappings()]


async def change_limits(
    database: Database,
    scope: str,
    id: str | None,
    changes: Mapping[str, Any],
    *,
    by: Caller | None = None,
    request_id: str = "",
) -> Share:
    """Sets those of LIMITS that are given; None takes one away. What is stored already stays, even above a new limit."""
    for name, value in changes.items():
        if name not in LIMITS:
            raise BadInput(f"'{name}' is no limit; expected {' or '.join(LIMITS)}")
        check_limit(name, value)
    async with database.writing() as connection:
        found, workspace = await _find(connection, scope, id)
        now = await usage(connection, _kept_as(scope), found)
        wanted = {name: changes.get(name, getattr(now, name)) for name in LIMITS}
        await set_limit(connection, _kept_as(scope), found, **wanted)
        subject = found.partition("/")[0] if scope == "user" else found
        detail = {"scope": scope, **changes, **({"user_id": found.partition("/")[2]} if scope == "user" else {})}
        await append(connection, acting(by, workspace), "limits_changed", subject, request_id=request_id, detail=detail)
        return Share(scope, found, await usage(connection, _kept_as(scope), found))


async def _find(connection: AsyncConnection, scope: str, id: str | None) -> tuple[str, Workspace]:
    """The id under which a scope is kept, and the workspace it concerns."""
    _check_scope(scope)
    if scope in ("organization", "new_workspaces"):
        return (await organization(connection))[0], await find_workspace(connection, DEFAULT)
    if not id:
        raise BadInput(f"the limits of a {scope} need its id")
    if scope == "workspace":
        workspace = await find_workspace(connection, id)
        return workspace.id, workspace
    if scope == "key":
        key = await find_key(connection, id)
        return key.id, await find_workspace(connection, key.workspace_id or DEFAULT)
    name, slash, user_id = id.rpartition("/")
    if not slash:
        raise BadInput(f"'{id}' is no user of a workspace; expected WORKSPACE/USER")
    check_user_id(user_id)
    workspace = await find_workspace(connection, name)
    return f"{workspace.id}/{user_id}", workspace


def _kept_as(scope: str) -> str:
    # Kept as the limits of a workspace whose id is the organisation's.
    return "workspace" if scope == "new_workspaces" else scope


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise BadInput(f"scope: '{scope}' is none; expected one of {', '.join(SCOPES)}")
