"""Administration over HTTP: workspaces and keys as the Admin API has them, and beyond it new keys, limits, usage and the audit log.

Every route asks for the right 'admin' before anything else, so that who has it not learns nothing here.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ropewalk.database import now
from ropewalk.errors import BadInput
from ropewalk.server import admin_log
from ropewalk.server.admin_requests import LIMIT, PREFIX, admins, asked_of, flag_of, given_in, id_of, store_of, who
from ropewalk.server.files import limit_of
from ropewalk.server.openapi import STRING, nullable, operation, query, record
from ropewalk.server.wire import JSON
from ropewalk.server.wire_admin import (
    API_KEY,
    BOOLEAN,
    LIMITS,
    NEW_API_KEY,
    NUMBER,
    ORGANIZATION,
    STRINGS,
    WORKSPACE,
    key_body,
    page,
    page_body,
    workspace_body,
)
from ropewalk.tenants import keys, workspaces

PAGING = [
    LIMIT,
    query("after_id", STRING, "only what stands after this one"),
    query("before_id", STRING, "only what stands before this one"),
]
SETTINGS = {
    "name": STRING,
    "requests_per_minute": nullable(NUMBER),
    "downloads": {"enum": list(workspaces.DOWNLOADS)},
    **{name: nullable(NUMBER) for name in workspaces.OF_JOBS},
}


# -- organisation and workspaces -------------------------------------------------------------------------------------------------


@operation("the organisation that this server serves", {200: ORGANIZATION})
@admins
async def show_organization(request: Request) -> JSON:
    """GET /v1/organizations/me"""
    async with store_of(request).database.reading() as connection:
        id, name = await workspaces.organization(connection)
    return JSON({"id": id, "type": "organization", "name": name})


@operation(
    "list workspaces, newest first",
    {200: page(WORKSPACE)},
    parameters=[
        *PAGING,
        query("include_archived", BOOLEAN, "archived ones too; default: false"),
        query("include_default", BOOLEAN, "the workspace 'default' too; default: true"),
        query("ids[]", STRINGS, "only these, at most 100"),
    ],
)
@admins
async def list_workspaces(request: Request) -> JSON:
    """GET /v1/organizations/workspaces"""
    asked = request.query_params
    ids = [*dict.fromkeys(id.replace("\0", "") for id in [*asked.getlist("ids[]"), *asked.getlist("ids")])]
    if len(ids) > 100:
        raise BadInput(f"ids[]: {len(ids)} were given; expected at most 100")
    found = await workspaces.list_workspaces(
        store_of(request).database,
        limit=limit_of(request),
        after_id=asked_of(request, "after_id"),
        before_id=asked_of(request, "before_id"),
        archived=flag_of(request, "include_archived", False),
        default=flag_of(request, "include_default", True),
        ids=ids or None,
    )
    return JSON(page_body([workspace_body(workspace) for workspace in found.items], found.more))


@operation("make a workspace", {200: WORKSPACE}, body=record({**SETTINGS, **LIMITS}, optional=[*SETTINGS, *LIMITS][1:]))
@admins
async def create_workspace(request: Request) -> JSON:
    """POST /v1/organizations/workspaces"""
    given = await given_in(request, {*SETTINGS, *LIMITS})
    if "name" not in given:
        raise BadInput("name: it is missing; expected the name of the workspace")
    store = store_of(request)
    made = await workspaces.create_workspace(store.database, store.vault, given.pop("name"), **given, **who(request))
    return JSON(workspace_body(made))


@operation("what is known about a workspace", {200: WORKSPACE})
@admins
async def show_workspace(request: Request) -> JSON:
    """GET /v1/organizations/workspaces/{workspace_id}"""
    async with store_of(request).database.reading() as connection:
        return JSON(workspace_body(await workspaces.find_workspace(connection, id_of(request))))


@operation("change a workspace", {200: WORKSPACE}, body=record(SETTINGS, optional=[*SETTINGS]))
@admins
async def change_workspace(request: Request) -> JSON:
    """POST /v1/organizations/workspaces/{workspace_id}"""
    given = await given_in(request, {*SETTINGS})
    return JSON(
        workspace_body(await workspaces.change_workspace(store_of(request).database, id_of(request), given, **who(request)))
    )


@operation("close a workspace for good: its keys end at once", {200: WORKSPACE})
@admins
async def archive_workspace(request: Request) -> JSON:
    """POST /v1/organizations/workspaces/{workspace_id}/archive"""
    return JSON(workspace_body(await workspaces.archive_workspace(store_of(request).database, id_of(request), **who(request))))


# -- keys ------------------------------------------------------------------------------------------------------------------------


@operation(
    "list keys, newest first",
    {200: page(API_KEY)},
    parameters=[
        *PAGING,
        query("workspace_id", STRING, "only keys of this workspace"),
        query("status", {"enum": [*keys.STATUSES, "inactive"]}, "only keys of this status"),
    ],
)
@admins
async def list_keys(request: Request) -> JSON:
    """GET /v1/organizations/api_keys"""
    found = await keys.list_keys(
        store_of(request).database,
        workspace_id=asked_of(request, "workspace_id"),
        status=asked_of(request, "status"),
        limit=limit_of(request),
        after_id=asked_of(request, "after_id"),
        before_id=asked_of(request, "before_id"),
    )
    return JSON(page_body([key_body(key) for key in found.items], found.more))


NEW_KEY = {
    "name": STRING,
    "workspace_id": {**nullable(STRING), "description": "null: every workspace"},
    "rights": STRINGS,
    "user_id": {**nullable(STRING), "description": "the one user that the key acts for"},
    "expires_in_seconds": nullable({"type": "integer", "minimum": 1}),
}


@operation(
    "make a key; the answer is the only place where its secret is shown",
    {200: NEW_API_KEY},
    body=record(NEW_KEY, optional=["rights", "user_id", "expires_in_seconds"]),
)
@admins
async def create_key(request: Request) -> JSON:
    """POST /v1/organizations/api_keys"""
    given = await given_in(request, {*NEW_KEY})
    name, rights, user_id = given.get("name"), given.get("rights"), given.get("user_id")
    if "workspace_id" not in given:
        raise BadInput("workspace_id: it is missing; expected the id of a workspace, or null for every one")
    if not isinstance(name, str):
        raise BadInput(f"name: {name!r} is no name; expected a text")
    if rights is not None and not (isinstance(rights, list) and all(isinstance(right, str) for right in rights)):
        raise BadInput(f"rights: {rights!r} is no list of texts")
    for part in ("workspace_id", "user_id"):
        if given.get(part) is not None and not isinstance(given[part], str):
            raise BadInput(f"{part}: {given[part]!r} is no id; expected a text or null")
    store = store_of(request)
    key, secret = await keys.create_key(
        store.database,
        store.vault,
        given["workspace_id"],
        name,
        rights=keys.USUAL_RIGHTS if rights is None else rights,
        user_id=user_id,
        expires_at=_expiry(given.get("expires_in_seconds")),
        **who(request),
    )
    return JSON(key_body(key, secret))


@operation("what is known about a key", {200: API_KEY})
@admins
async def show_key(request: Request) -> JSON:
    """GET /v1/organizations/api_keys/{api_key_id}"""
    async with store_of(request).database.reading() as connection:
        return JSON(key_body(await keys.find_key(connection, id_of(request))))


@operation(
    "rename a key, or revoke it by the status archived or inactive, for good",
    {200: API_KEY},
    body=record(
        {"name": nullable(STRING), "status": nullable({"enum": ["active", "inactive", "archived"]})},
        optional=["name", "status"],
    ),
)
@admins
async def change_key(request: Request) -> JSON:
    """POST /v1/organizations/api_keys/{api_key_id}"""
    given, id, database = await given_in(request, {"name", "status"}), id_of(request), store_of(request).database
    name, status = given.get("name"), given.get("status")
    async with database.reading() as connection:
        key = await keys.find_key(connection, id)
    if status not in (None, "active", "inactive", "archived"):
        raise BadInput(f"status: {status!r} is none that a key can be given; expected active, inactive or archived")
    if status == "active" and key.status != "active":
        raise BadInput(f"the key is {key.status}, for good; make a new one")
    if name is not None:
        key = await keys.rename_key(database, id, name)
    if status in ("inactive", "archived"):
        key = await keys.revoke_key(database, id, **who(request))
    return JSON(key_body(key))


def _expiry(seconds: Any) -> int | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not 1 <= seconds <= 10**9:
        raise BadInput(f"expires_in_seconds: {seconds!r} is none; expected a whole number from 1 to 1,000,000,000")
    return now() + seconds * 1_000_000


routes: list[BaseRoute] = [
    Route(f"{PREFIX}/me", show_organization),
    Route(f"{PREFIX}/workspaces", list_workspaces),
    Route(f"{PREFIX}/workspaces", create_workspace, methods=["POST"]),
    Route(f"{PREFIX}/workspaces/{{workspace_id}}", show_workspace),
    Route(f"{PREFIX}/workspaces/{{workspace_id}}", change_workspace, methods=["POST"]),
    Route(f"{PREFIX}/workspaces/{{workspace_id}}/archive", archive_workspace, methods=["POST"]),
    Route(f"{PREFIX}/api_keys", list_keys),
    Route(f"{PREFIX}/api_keys", create_key, methods=["POST"]),
    Route(f"{PREFIX}/api_keys/{{api_key_id}}", show_key),
    Route(f"{PREFIX}/api_keys/{{api_key_id}}", change_key, methods=["POST"]),
    *admin_log.routes,
]
