"""The rows of files: what a caller may see of them, page by page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, Text, and_, bindparam, func, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import now
from ropewalk.errors import FileExpired, NotFound
from ropewalk.files.tables import blobs, files
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import workspaces

ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # what is none is not looked for: not every database can be asked for every text

UNSAID = "user_data"  # the purpose of a file of which none was told

Place = tuple[int, str]  # (created_at, id): where a file stands in a list


@dataclass(frozen=True)
class File:
    """What is known about a file. Times are microseconds since the epoch, UTC."""

    id: str
    workspace_id: str
    user_id: str | None
    key_id: str | None
    blob_id: str | None  # None once the bytes have been given back
    filename: str
    mime_type: str
    size: int
    sha256: str
    tags: tuple[str, ...]
    created_at: int
    expires_at: int | None
    expired_at: int | None  # when the bytes were given back
    downloadable: bool
    purpose: str | None = None  # what it is for, where somebody said so
    lineage: Mapping[str, Any] | None = None  # of one that was written here: by what, and from which files

    @property
    def expired(self) -> bool:
        """Whether its hour has passed, whether or not the sweep has been there."""
        return self.expired_at is not None or (self.expires_at is not None and self.expires_at <= now())

    @property
    def place(self) -> Place:
        return self.created_at, self.id


@dataclass(frozen=True)
class Listing:
    """A page of files, newest first, and whether there are more in the direction asked for."""

    files: list[File]
    more: bool


@dataclass(frozen=True)
class Details:
    """What is known of a file's content, as far as the caller may know it."""

    shared_with: int  # other files of the caller's with equal bytes
    verified_at: int | None
    damaged_at: int | None


@dataclass(frozen=True)
class Stored:
    """A file and what opens its bytes."""

    file: File
    sealed_data_key: bytes
    sealed_workspace_key: bytes


def visible(caller: Caller) -> ColumnElement[bool]:
    """Files of the caller's workspace, and of its user if it stands for one."""
    mine = files.c.workspace_id == caller.workspace_id
    return mine if caller.user_id is None else and_(mine, files.c.user_id == caller.user_id)


def missing(id: str) -> NotFound:
    """The same for an id that never was, that is deleted, and that is another's."""
    return NotFound(f"File `{id[:128]}` not found.")


async def find(connection: AsyncConnection, caller: Caller, id: str) -> File:
    """One file, or NotFound."""
    if not ID.fullmatch(id):
        raise missing(id)
    row = (await connection.execute(ONE, {"id": id, "workspace": caller.workspace_id, "user": caller.user_id})).first()
    if row is None:
        raise missing(id)
    return as_file(row)


async def find_stored(connection: AsyncConnection, caller: Caller, id: str) -> Stored:
    """One file with the keys to its bytes; FileExpired when its hour has passed."""
    query = _selected(blobs.c.sealed_key.label("data_key"), workspaces.c.sealed_key.label("workspace_key")).outerjoin(
        blobs, blobs.c.id == files.c.blob_id
    )
    if not ID.fullmatch(id):
        raise missing(id)
    row = (await connection.execute(query.where(files.c.id == id, visible(caller)))).first()
    if row is None:
        raise missing(id)
    file = as_file(row)
    if file.expired or row.data_key is None or row.workspace_key is None:
        raise FileExpired(f"File `{id}` has expired.")
    return Stored(file, row.data_key, row.workspace_key)


async def find_all(connection: AsyncConnection, caller: Caller, ids: Sequence[str]) -> list[File]:
    """Those of these files that the caller may see, newest first."""
    query = _selected().where(files.c.id.in_([id for id in ids if ID.fullmatch(id)]), visible(caller))
    rows = await connection.execute(query.order_by(files.c.created_at.desc(), files.c.id.desc()))
    return [as_file(row) for row in rows]


async def sharing(connection: AsyncConnection, blob_id: str) -> list[File]:
    """Every file of this content."""
    return [as_file(row) for row in await connection.execute(_selected().where(files.c.blob_id == blob_id))]


async def replace_tags(connection: AsyncConnection, caller: Caller, id: str, tags: Sequence[str]) -> File:
    """The file with other tags."""
    if not ID.fullmatch(id):
        raise missing(id)
    changed = await connection.execute(update(files).where(files.c.id == id, visible(caller)).values(tags=list(tags)))
    if not changed.rowcount:
        raise missing(id)
    return await find(connection, caller, id)


async def details(connection: AsyncConnection, caller: Caller, file: File) -> Details:
    """What its content has been through."""
    row = (await connection.execute(select(blobs).where(blobs.c.id == file.blob_id))).first()
    if row is None:
        return Details(0, None, None)
    mine = select(func.count()).select_from(files).where(files.c.blob_id == file.blob_id, visible(caller))
    return Details((await connection.execute(mine)).scalar_one() - 1, row.verified_at, row.damaged_at)


async def page(
    connection: AsyncConnection,
    caller: Caller,
    limit: int,
    after: Place | None,
    before: Place | None,
    tag: str | None,
    name: str | None = None,
    purpose: str | None = None,
) -> Listing:
    """Up to `limit` files older than `after`, or newer than `before` and next to it."""
    key = tuple_(files.c.created_at, files.c.id)
    query = _selected().where(visible(caller))
    if tag is not None:
        query = query.where(_has_tag(connection, tag))
    if name is not None:
        query = query.where(files.c.filename.istartswith(name, autoescape=True))
    if purpose is not None:
        query = query.where(func.coalesce(files.c.purpose, UNSAID) == purpose)
    if before is not None:
        rows = (
            await connection.execute(
                query.where(key > before).order_by(files.c.created_at.asc(), files.c.id.asc()).limit(limit + 1)
            )
        ).all()
        return Listing([as_file(row) for row in reversed(rows[:limit])], len(rows) > limit)
    if after is not None:
        query = query.where(key < after)
    rows = (await connection.execute(query.order_by(files.c.created_at.desc(), files.c.id.desc()).limit(limit + 1))).all()
    return Listing([as_file(row) for row in rows[:limit]], len(rows) > limit)


def as_file(row: Row[Any]) -> File:
    """A row of `_selected` as a File."""
    values = row._mapping
    return File(
        **{name: values[name] for name in File.__dataclass_fields__ if name not in ("tags", "downloadable")},
        tags=tuple(values["tags"]),
        downloadable=values["downloads"] == "owner",
    )


def _selected(*more: Any) -> Select[Any]:
    return select(files, workspaces.c.downloads, *more).join(workspaces, workspaces.c.id == files.c.workspace_id)


def _has_tag(connection: AsyncConnection, tag: str) -> ColumnElement[bool]:
    each = (func.json_each if connection.dialect.name == "sqlite" else func.json_array_elements_text)(files.c.tags)
    values = each.table_valued("value")
    return select(1).select_from(values).where(values.c.value == tag).exists()


ONE = _selected().where(  # `visible`, put together once: every request for a file asks it
    files.c.id == bindparam("id"),
    files.c.workspace_id == bindparam("workspace"),
    bindparam("user", type_=Text).is_(None) | (files.c.user_id == bindparam("user", type_=Text)),
)
