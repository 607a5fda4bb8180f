"""Keys: who asks. A secret is shown once; what is kept of it opens nothing."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import Database, now
from ropewalk.errors import BadInput, NotFound, PermissionDenied
from ropewalk.ids import new_id
from ropewalk.tenants.audit import append
from ropewalk.tenants.caller import RIGHTS, Caller
from ropewalk.tenants.secrets import open_secret
from ropewalk.tenants.tables import keys, workspaces
from ropewalk.tenants.workspaces import COLUMNS as WORKSPACE_COLUMNS
from ropewalk.tenants.workspaces import DEFAULT, PAGE, Page, Workspace, acting, find_workspace, organization, page_of
from ropewalk.vault import Vault

USUAL_RIGHTS = frozenset({"read", "write", "download"})
STATUSES = ("active", "expired", "archived")
_USER = re.compile(r"[A-Za-z0-9._@:+=-]{1,128}")
_KEY_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,500}")


@dataclass(frozen=True)
class Key:
    """What is known of a key; the secret is not."""

    id: str
    organization_id: str
    workspace_id: str | None  # None: every workspace of the organisation
    name: str
    hint: str  # the secret's last four characters
    rights: frozenset[str]
    user_id: str | None  # the one user it acts for; None: not bound to one
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    workspace: Workspace | None = field(default=None, compare=False, repr=False)  # as it was when the key was authenticated

    @property
    def status(self) -> str:
        """One of STATUSES."""
        if self.revoked_at is not None:
            return "archived"
        return "expired" if self.expires_at is not None and self.expires_at <= now() else "active"


NAMES = [field.name for field in fields(Key) if field.name != "workspace"]
COLUMNS = [keys.c[name] for name in NAMES]
OF_WORKSPACE = {f"workspace_{column.name}": column for column in WORKSPACE_COLUMNS if column.name != "id"}
OF_DIGEST = (  # put together once: every request asks it
    select(*COLUMNS, keys.c.digest, *(column.label(name) for name, column in OF_WORKSPACE.items()))
    .join_from(keys, workspaces, keys.c.workspace_id == workspaces.c.id, isouter=True)
    .where(keys.c.digest == bindparam("wanted"))
)


def digest(pepper: bytes, secret: str) -> bytes:
    """What is kept of a secret: guessing it needs the pepper, which the root key wraps."""
    return hmac.digest(pepper, secret.encode(), hashlib.sha256)


async def create_key(
    database: Database,
    vault: Vault,
    workspace_id: str | None,
    name: str,
    *,
    rights: Iterable[str] = USUAL_RIGHTS,
    user_id: str | None = None,
    expires_at: int | None = None,
    secret: str | None = None,
    by: Caller | None = None,
    request_id: str = "",
) -> tuple[Key, str]:
    """A key and its secret, which is nowhere else afterwards. Without a workspace it is for every one of them."""
    granted = frozenset(rights)
    _check(workspace_id, name, granted, user_id, expires_at)
    secret = secret or f"rw-{_kind(granted, user_id)}-{secrets.token_urlsafe(32)}"  # 256 bits
    async with database.writing() as connection:
        workspace = await find_workspace(connection, workspace_id or DEFAULT)
        if workspace.archived_at is not None:
            raise BadInput(f"the workspace '{workspace.name}' is archived; a key for it would open nothing")
        organization_id, _ = await organization(connection)
        key = Key(
            id=new_id("key"),
            organization_id=organization_id,
            workspace_id=workspace.id if workspace_id is not None else None,
            name=name,
            hint=secret[-4:],
            rights=granted,
            user_id=user_id,
            created_at=now(),
            expires_at=expires_at,
            revoked_at=None,
        )
        kept = digest(await open_secret(connection, vault, "pepper"), secret)
        row = {name: getattr(key, name) for name in NAMES}
        try:
            await connection.execute(insert(keys).values({**row, "rights": json.dumps(sorted(granted)), "digest": kept}))
        except IntegrityError as error:
            raise BadInput("this secret is that of a key already; leave it out, and a random one is made") from error
        detail = {"rights": sorted(granted), "user_id": user_id, "every_workspace": workspace_id is None}
        await append(connection, acting(by, workspace), "key_created", key.id, request_id=request_id, detail=detail)
    return key, secret


async def authenticate(connection: AsyncConnection, pepper: bytes, secret: str) -> Key | None:
    """The key of a secret, if it opens anything now. Asked anew for every request, so that a revocation holds at once everywhere."""
    wanted = digest(pepper, secret)
    row = (await connection.execute(OF_DIGEST, {"wanted": wanted})).mappings().first()
    if row is None or not hmac.compare_digest(bytes(row["digest"]), wanted) or row["workspace_archived_at"] is not None:
        return None
    key = _key(row)
    if key.workspace_id is not None:
        known = {column.name: row[name] for name, column in OF_WORKSPACE.items()}
        key = replace(key, workspace=Workspace(id=key.workspace_id, **known))
    return key if key.status == "active" else None


async def admit(
    connection: AsyncConnection, key: Key, workspace_id: str | None = None, user_id: str | None = None
) -> tuple[Caller, Workspace]:
    """Who a request acts as, from its key and from the workspace and user that its headers name."""
    if key.workspace_id is not None and workspace_id not in (None, key.workspace_id):
        # The same words whether or not there is such a workspace.
        raise PermissionDenied(
            f"this key is for one workspace, and it is not '{workspace_id}'; leave anthropic-workspace-id out"
        )
    workspace = key.workspace
    if workspace is None:
        with suppress(NotFound):
            workspace = await find_workspace(connection, key.workspace_id or workspace_id or DEFAULT)
    if workspace is None or workspace.archived_at is not None or workspace_id not in (None, workspace.id):
        raise NotFound(f"Workspace `{workspace_id}` not found.")
    if user_id is not None and user_id != key.user_id:
        if key.user_id is not None:
            raise PermissionDenied(f"this key acts for one user, and it is not '{user_id}'; leave anthropic-user-id out")
        if "users" not in key.rights:
            raise PermissionDenied("this key may not act for a user: it needs the right 'users'")
        check_user_id(user_id)
    return Caller(key.organization_id, workspace.id, key.id, key.user_id or user_id, key.rights), workspace


async def find_key(connection: AsyncConnection, id: str) -> Key:
    """A key by its id."""
    row = (await connection.execute(select(*COLUMNS).where(keys.c.id == id))).mappings().first()
    if row is None:
        raise NotFound(f"API key `{id}` not found.")
    return _key(row)


async def list_keys(
    database: Database,
    *,
    workspace_id: str | None = None,
    status: str | None = None,
    limit: int = PAGE,
    after_id: str | None = None,
    before_id: str | None = None,
) -> Page[Key]:
    """Keys, newest first."""
    query = select(*COLUMNS)
    if workspace_id is not None:
        query = query.where(keys.c.workspace_id == workspace_id)
    if status is not None:
        query = query.where(_has_status(status))
    async with database.reading() as connection:
        page = await page_of(connection, query, keys, limit, after_id, before_id)
    return Page([_key(row) for row in page.items], page.more)


async def rename_key(database: Database, id: str, name: str) -> Key:
    """Gives a key another name, which is for people and opens nothing."""
    _check_name(name)
    async with database.writing() as connection:
        await connection.execute(update(keys).where(keys.c.id == id).values(name=name))
        return await find_key(connection, id)


async def revoke_key(database: Database, id: str, *, by: Caller | None = None, request_id: str = "") -> Key:
    """Ends a key for good: the next request with it is refused, by every process."""
    async with database.writing() as connection:
        key = await find_key(connection, id)
        if key.revoked_at is None:
            await connection.execute(update(keys).where(keys.c.id == id).values(revoked_at=now()))
            workspace = await find_workspace(connection, key.workspace_id or DEFAULT)
            await append(connection, acting(by, workspace), "key_revoked", id, request_id=request_id)
        return await find_key(connection, id)


def check_user_id(user_id: str) -> None:
    """Raises BadInput for what cannot be a user's id."""
    if not _USER.fullmatch(user_id):
        raise BadInput(f"{user_id[:140]!r} is no user id; expected 1 to 128 of the characters A-Z a-z 0-9 . _ @ : + = -")


def _check(workspace_id: str | None, name: str, rights: frozenset[str], user_id: str | None, expires_at: int | None) -> None:
    _check_name(name)
    if unknown := rights - RIGHTS:
        raise BadInput(f"'{sorted(unknown)[0]}' is no right of a key; expected some of {', '.join(sorted(RIGHTS))}")
    if not rights:
        raise BadInput(f"a key without rights may do nothing; give it some of {', '.join(sorted(RIGHTS))}")
    if "admin" in rights and (workspace_id is not None or user_id is not None):
        raise BadInput(
            "a key with the right 'admin' is for every workspace and for no one user: "
            'make it with --every-workspace, or over HTTP with "workspace_id": null'
        )
    if user_id is not None:
        check_user_id(user_id)
        if "users" in rights:
            raise BadInput(f"a key is either bound to the user '{user_id}' or has the right 'users', for any of them")
    if expires_at is not None and expires_at <= now():
        raise BadInput("a key that has expired would open nothing; let it expire later, or never")


def _check_name(name: str) -> None:
    if not _KEY_NAME.fullmatch(name):
        raise BadInput(f"{name[:60]!r} is no name for a key; expected 1 to 500 characters, no control characters")


def _kind(rights: frozenset[str], user_id: str | None) -> str:
    return "admin" if "admin" in rights else "user" if user_id else "key"


def _has_status(status: str) -> Any:
    expired = keys.c.expires_at.is_not(None) & (keys.c.expires_at <= now())
    ways = {
        "active": keys.c.revoked_at.is_(None) & ~expired,
        "expired": keys.c.revoked_at.is_(None) & expired,
        "archived": keys.c.revoked_at.is_not(None),
        "inactive": keys.c.id.is_(None),  # a status of Anthropic's that no key has here
    }
    if status not in ways:
        raise BadInput(f"status: '{status}' is no status of a key; expected one of {', '.join(ways)}")
    return ways[status]


def _key(row: Any) -> Key:
    values = {name: row[name] for name in NAMES}
    return Key(**{**values, "rights": frozenset(json.loads(row["rights"]))})
