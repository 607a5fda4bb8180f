"""Workspaces: the boundary between tenants. Each has a key of its own, without which nothing in it can be read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, Text, bindparam, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import Database, now
from ropewalk.errors import BadInput, NotFound
from ropewalk.ids import new_id
from ropewalk.tenants.audit import append, start_chain
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.quotas import set_limit, usage
from ropewalk.tenants.secrets import NAMES, check_root, ensure_secrets, workspace_purpose
from ropewalk.tenants.tables import chains, keys, organizations, workspaces
from ropewalk.tenants.tables import secrets as sealed_secrets
from ropewalk.vault import Vault, new_key

DEFAULT = "default"  # the name of the organisation and of the workspace that the first start makes
DOWNLOADS = ("owner", "nobody")
OF_JOBS = ("jobs_running", "jobs_queued", "jobs_file_bytes")
SETTINGS = ("requests_per_minute", "downloads", *OF_JOBS)
PAGE = 1000  # the most that a list gives at once
Item = TypeVar("Item")
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,100}")
_MOST = 1 << 62
MOST = {"jobs_running": 10_000, "jobs_queued": 1_000_000, "jobs_file_bytes": _MOST}


@dataclass(frozen=True)
class Workspace:
    """One tenant."""

    id: str
    organization_id: str
    name: str
    created_at: int
    archived_at: int | None
    requests_per_minute: int | None  # None: the server's default
    downloads: str  # who may download what was uploaded: owner | nobody
    jobs_running: int | None = None  # trainings at a time; here and below, None: the server's default
    jobs_queued: int | None = None  # that have not ended
    jobs_file_bytes: int | None = None  # of the files of all these


@dataclass(frozen=True)
class Page(Generic[Item]):
    """Part of a list, newest first."""

    items: list[Item]
    more: bool


COLUMNS = [workspaces.c[field.name] for field in fields(Workspace)]
WANTED = bindparam("wanted", type_=Text)
NAMED = select(*COLUMNS).where((workspaces.c.id == WANTED) | (workspaces.c.name == WANTED))  # once: every request asks it


async def ensure_default(database: Database, vault: Vault) -> Workspace:
    """What every store has: secrets, an organisation, a workspace 'default'. A root key that is not the store's is told at once."""
    async with database.reading() as connection:
        if await _is_whole(connection):
            await check_root(connection, vault)
            return await find_workspace(connection, DEFAULT)
    async with database.writing() as connection:
        await ensure_secrets(connection, database, vault)  # first: of processes that start at once, the second waits here
        await start_chain(connection, database)
        organization_id = (await connection.execute(select(organizations.c.id))).scalar()
        if organization_id is None:
            organization_id = new_id("org")
            row = {"id": organization_id, "name": DEFAULT, "created_at": now()}
            await connection.execute(insert(organizations).values(row))
        if (await connection.execute(select(workspaces.c.id).where(workspaces.c.name == DEFAULT))).scalar() is None:
            made = await _insert(connection, vault, organization_id, DEFAULT, {})
            await append(connection, acting(None, made), "workspace_created", made.id)
        return await find_workspace(connection, DEFAULT)


async def organization(connection: AsyncConnection) -> tuple[str, str]:
    """Id and name of the organisation that this store serves."""
    row = (await connection.execute(select(organizations.c.id, organizations.c.name))).one()
    return row.id, row.name


async def create_workspace(
    database: Database,
    vault: Vault,
    name: str,
    *,
    limit_bytes: int | None = None,
    limit_files: int | None = None,
    by: Caller | None = None,
    request_id: str = "",
    **settings: Any,
) -> Workspace:
    """A new workspace with a new key and such of SETTINGS; a limit that is not given is the one that the organisation has set for
    new workspaces."""
    check_settings({"name": name, **settings})
    check_limit("limit_bytes", limit_bytes)
    check_limit("limit_files", limit_files)
    async with database.writing() as connection:
        await check_root(connection, vault)
        organization_id, _ = await organization(connection)
        await _name_is_free(connection, name)
        made = await _insert(connection, vault, organization_id, name, settings)
        usual = await usage(connection, "workspace", organization_id)
        limit_bytes = usual.limit_bytes if limit_bytes is None else limit_bytes
        limit_files = usual.limit_files if limit_files is None else limit_files
        await set_limit(connection, "workspace", made.id, limit_bytes, limit_files)
        await append(connection, acting(by, made), "workspace_created", made.id, request_id=request_id)
    return made


async def find_workspace(connection: AsyncConnection, id_or_name: str) -> Workspace:
    """A workspace by its id or else its name, archived or not."""
    rows = (await connection.execute(NAMED, {"wanted": id_or_name})).mappings().all()
    if not rows:
        raise NotFound(f"Workspace `{id_or_name}` not found.")
    return Workspace(**next((row for row in rows if row["id"] == id_or_name), rows[0]))


async def list_workspaces(
    database: Database,
    *,
    limit: int = PAGE,
    after_id: str | None = None,
    before_id: str | None = None,
    archived: bool = False,
    default: bool = True,
    ids: Sequence[str] | None = None,
) -> Page[Workspace]:
    """Workspaces, newest first; archived ones only when asked for."""
    query = select(*COLUMNS)
    if not default:
        query = query.where(workspaces.c.name != DEFAULT)
    if ids is not None:
        query = query.where(workspaces.c.id.in_(ids))
    if not archived:
        query = query.where(workspaces.c.archived_at.is_(None))
    async with database.reading() as connection:
        page = await page_of(connection, query, workspaces, limit, after_id, before_id)
    return Page([Workspace(**row) for row in page.items], page.more)


async def change_workspace(
    database: Database, id_or_name: str, changes: Mapping[str, Any], *, by: Caller | None = None, request_id: str = ""
) -> Workspace:
    """Changes its name, or some of SETTINGS."""
    check_settings(changes)
    async with database.writing() as connection:
        found = await find_workspace(connection, id_or_name)
        _is_not_archived(found)
        if changes.get("name", found.name) != found.name:
            if found.name == DEFAULT:
                raise BadInput("the workspace 'default' keeps its name: keys that name no workspace mean it")
            await _name_is_free(connection, changes["name"])
        if changes:
            await connection.execute(update(workspaces).where(workspaces.c.id == found.id).values(**changes))
        told = {name: value for name, value in changes.items() if name != "name"}
        await append(connection, acting(by, found), "workspace_changed", found.id, request_id=request_id, detail=told)
    return replace(found, **changes)


async def archive_workspace(
    database: Database, id_or_name: str, *, by: Caller | None = None, request_id: str = ""
) -> Workspace:
    """Closes a workspace for good: its keys are revoked in the same transaction. Its files stay until it is deleted."""
    async with database.writing() as connection:
        found = await find_workspace(connection, id_or_name)
        if found.name == DEFAULT:
            raise BadInput("the workspace 'default' cannot be archived: keys that name no workspace mean it")
        if found.archived_at is None:
            found = replace(found, archived_at=now())
            at = {"archived_at": found.archived_at}
            await connection.execute(update(workspaces).where(workspaces.c.id == found.id).values(at))
            mine = (keys.c.workspace_id == found.id) & keys.c.revoked_at.is_(None)
            revoked = await connection.execute(update(keys).where(mine).values(revoked_at=found.archived_at))
            detail = {"keys": revoked.rowcount}
            await append(connection, acting(by, found), "workspace_archived", found.id, request_id=request_id, detail=detail)
    return found


async def destroy_workspace_key(database: Database, id: str, *, by: Caller | None = None, request_id: str = "") -> None:
    """Makes everything that is sealed in an archived workspace unreadable, but in backups; its name is free again."""
    async with database.writing() as connection:
        found = await find_workspace(connection, id)
        if found.archived_at is None:
            raise BadInput(
                f"the workspace '{found.name}' is in use: archive it first, `ropewalk workspaces archive {found.id}`"
            )
        mine = (workspaces.c.id == found.id) & workspaces.c.sealed_key.is_not(None)
        destroyed = await connection.execute(update(workspaces).where(mine).values(sealed_key=None, name=found.id))
        if destroyed.rowcount:
            await append(connection, acting(by, found), "workspace_deleted", found.id, request_id=request_id)
    await database.forget()


async def workspace_key(connection: AsyncConnection, vault: Vault, id: str) -> bytes:
    """The key that wraps a workspace's data keys."""
    sealed = (await connection.execute(select(workspaces.c.sealed_key).where(workspaces.c.id == id))).scalar()
    if sealed is None:
        raise NotFound(f"Workspace `{id}` not found.")
    return vault.unwrap(sealed, workspace_purpose(id))


def acting(by: Caller | None, workspace: Workspace) -> Caller:
    """Who the audit log names: the caller, in the workspace that was acted on; without one, the machine's command line."""
    if by is None:
        return Caller(workspace.organization_id, workspace.id, None)
    return replace(by, workspace_id=workspace.id)


def check_settings(changes: Mapping[str, Any]) -> None:
    """Raises BadInput for a setting that a workspace cannot have."""
    for setting, value in changes.items():
        if setting == "name":
            good, expected = (
                isinstance(value, str) and bool(_NAME.fullmatch(value)),
                "1 to 100 characters, no control characters",
            )
        elif setting == "requests_per_minute":
            whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000
            good, expected = value is None or whole, "a whole number from 1 to 1,000,000, or null for the server's default"
        elif setting in OF_JOBS:
            whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST[setting]
            good, expected = (
                value is None or whole,
                f"a whole number from 0 to {MOST[setting]:,}, or null for the server's default",
            )
        elif setting == "downloads":
            good, expected = value in DOWNLOADS, " or ".join(f"'{way}'" for way in DOWNLOADS)
        else:
            good, expected = False, f"one of name, {', '.join(SETTINGS)} as the setting's name"
        if not good:
            raise BadInput(f"{setting}: {value!r} is not a setting of a workspace; expected {expected}")


def check_limit(name: str, value: Any) -> None:
    """Raises BadInput for what cannot be a limit."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST):
        raise BadInput(f"{name}: {value!r} is no limit; expected a whole number from 0, or null for none")


async def page_of(
    connection: AsyncConnection, query: Select[Any], table: Any, limit: int, after_id: str | None, before_id: str | None
) -> Page[dict[str, Any]]:
    """Rows of a query over one table, newest first, after or before a row; keyset paging, so that no row is seen twice."""
    if not 1 <= limit <= PAGE:
        raise BadInput(f"limit: {limit} is out of range; expected 1 to {PAGE}")
    if after_id is not None and before_id is not None:
        raise BadInput("after_id and before_id were both given; expected one of them")
    place = tuple_(table.c.created_at, table.c.id)
    cursor = after_id or before_id
    if cursor:
        row = (await connection.execute(select(table.c.created_at, table.c.id).where(table.c.id == cursor))).first()
        if row is None:
            raise BadInput(f"{'after_id' if after_id else 'before_id'}: '{cursor}' is no id in this list")
        query = query.where(place < tuple(row) if after_id else place > tuple(row))
    # Before a row, the page is the one that ends there: read upward from it, and turned round.
    order = (table.c.created_at, table.c.id) if before_id else (table.c.created_at.desc(), table.c.id.desc())
    rows = [dict(row) for row in (await connection.execute(query.order_by(*order).limit(limit + 1))).mappings()]
    items = rows[:limit]
    return Page(items[::-1] if before_id else items, len(rows) > limit)


async def _is_whole(connection: AsyncConnection) -> bool:
    async def count(query: Any) -> int:
        return int((await connection.execute(query)).scalar_one())

    return (
        await count(select(func.count()).select_from(sealed_secrets).where(sealed_secrets.c.name.in_(NAMES))) == len(NAMES)
        and await count(select(func.count()).select_from(chains).where(chains.c.name == "audit")) == 1
        and await count(select(func.count()).select_from(workspaces).where(workspaces.c.name == DEFAULT)) == 1
    )


async def _insert(
    connection: AsyncConnection,
    vault: Vault,
    organization_id: str,
    name: str,
    settings: Mapping[str, Any],
) -> Workspace:
    told = {"requests_per_minute": None, "downloads": "owner", **settings}
    made = Workspace(new_id("wrkspc"), organization_id, name, now(), None, **told)
    sealed = vault.wrap(new_key(), workspace_purpose(made.id))
    row = {field.name: getattr(made, field.name) for field in fields(Workspace)}
    await connection.execute(insert(workspaces).values(**row, sealed_key=sealed))
    return made


async def _name_is_free(connection: AsyncConnection, name: str) -> None:
    # The row of the organisation is locked, so that of two who want a name one is told here and not by the table.
    await connection.execute(select(organizations.c.id).with_for_update())
    if (await connection.execute(select(workspaces.c.id).where(workspaces.c.name == name))).scalar() is not None:
        raise BadInput(f"the workspace name '{name}' is taken, by a workspace in use or an archived one; choose another")


def _is_not_archived(workspace: Workspace) -> None:
    if workspace.archived_at is not None:
        raise BadInput(f"the workspace '{workspace.name}' is archived, for good; create a new one")
