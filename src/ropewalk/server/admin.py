"""Administration over HTTP: workspaces and keys as the Admin API has them, and beyond it new keys, limits, usage and the audit log.

Every route asks for the right 'admin' before anything else, so that who has it not learns nothing here.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from ropewalk.database import now
from ropewalk.errors import BadInput
from ropewalk.files.store import Store
from ropewalk.server import body
from ropewalk.server.auth import caller_of
from ropewalk.server.files import DEFAULT_LIMIT, MAX_LIMIT, limit_of
from ropewalk.server.openapi import STRING, nullable, operation, query, record
from ropewalk.server.wire import JSON
from ropewalk.server.wire_admin import (
    API_KEY,
    ENTRY,
    NEW_API_KEY,
    NUMBER,
    ORGANIZATION,
    REPORT,
    SHARE,
    STRINGS,
    WORKSPACE,
    key_body,
    page,
    page_body,
    report_body,
    share_body,
    workspace_body,
)
from ropewalk.tenants import audit, keys, usage, workspaces

BOOLEAN = {"type": "boolean"}
TEXT = re.compile(r"[^\x00\ud800-\udfff]{0,1000}")  # what every database can hold
LIMIT = query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}, "how many at once")
PAGING = [
    LIMIT,
    query("after_id", STRING, "only what stands after this one"),
    query("before_id", STRING, "only what stands before this one"),
]
SETTINGS = {"name": STRING, "requests_per_minute": nullable(NUMBER), "downloads": {"enum": list(workspaces.DOWNLOADS)}}
LIMITS = {name: nullable(NUMBER) for name in usage.LIMITS}
Handler = Callable[[Request], Awaitable[Response]]


def admins(handler: Handler) -> Handler:
    """Asks for the right 'admin' first."""

    @wraps(handler)
    async def asked(request: Request) -> Response:
        caller_of(request).needs("admin")
        return await handler(request)

    return asked


# -- organisation and workspaces -------------------------------------------------------------------------------------------------


@operation("the organisation that this server serves", {200: ORGANIZATION})
@admins
async def show_organization(request: Request) -> JSON:
    """GET /v1/organizations/me"""
    async with _store(request).database.reading() as connection:
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
        _store(request).database,
        limit=limit_of(request),
        after_id=_asked(request, "after_id"),
        before_id=_asked(request, "before_id"),
        archived=_flag(request, "include_archived", False),
        default=_flag(request, "include_default", True),
        ids=ids or None,
    )
    return JSON(page_body([workspace_body(workspace) for workspace in found.items], found.more))


@operation("make a workspace", {200: WORKSPACE}, body=record({**SETTINGS, **LIMITS}, optional=[*SETTINGS, *LIMITS][1:]))
@admins
async def create_workspace(request: Request) -> JSON:
    """POST /v1/organizations/workspaces"""
    given = await _given(request, {*SETTINGS, *LIMITS})
    if "name" not in given:
        raise BadInput("name: it is missing; expected the name of the workspace")
    store = _store(request)
    made = await workspaces.create_workspace(store.database, store.vault, given.pop("name"), **given, **_who(request))
    return JSON(workspace_body(made))


@operation("what is known about a workspace", {200: WORKSPACE})
@admins
async def show_workspace(request: Request) -> JSON:
    """GET /v1/organizations/workspaces/{workspace_id}"""
    async with _store(request).database.reading() as connection:
        return JSON(workspace_body(await workspaces.find_workspace(connection, _id(request))))


@operation("change a workspace", {200: WORKSPACE}, body=record(SETTINGS, optional=[*SETTINGS]))
@admins
async def change_workspace(request: Request) -> JSON:
    """POST /v1/organizations/workspaces/{workspace_id}"""
    given = await _given(request, {*SETTINGS})
    return JSON(
        workspace_body(await workspaces.change_workspace(_store(request).database, _id(request), given, **_who(request)))
    )


@operation("close a workspace for good: its keys end at once", {200: WORKSPACE})
@admins
async def archive_workspace(request: Request) -> JSON:
    """POST /v1/organizations/workspaces/{workspace_id}/archive"""
    return JSON(workspace_body(await workspaces.archive_workspace(_store(request).database, _id(request), **_who(request))))


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
        _store(request).database,
        workspace_id=_asked(request, "workspace_id"),
        status=_asked(request, "status"),
        limit=limit_of(request),
        after_id=_asked(request, "after_id"),
        before_id=_asked(request, "before_id"),
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
    given = await _given(request, {*NEW_KEY})
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
    store = _store(request)
    key, secret = await keys.create_key(
        store.database,
        store.vault,
        given["workspace_id"],
        name,
        rights=keys.USUAL_RIGHTS if rights is None else rights,
        user_id=user_id,
        expires_at=_expiry(given.get("expires_in_seconds")),
        **_who(request),
    )
    return JSON(key_body(key, secret))


@operation("what is known about a key", {200: API_KEY})
@admins
async def show_key(request: Request) -> JSON:
    """GET /v1/organizations/api_keys/{api_key_id}"""
    async with _store(request).database.reading() as connection:
        return JSON(key_body(await keys.find_key(connection, _id(request))))


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
    given, id, database = await _given(request, {"name", "status"}), _id(request), _store(request).database
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
        key = await keys.revoke_key(database, id, **_who(request))
    return JSON(key_body(key))


# -- usage and limits ------------------------------------------------------------------------------------------------------------


SCOPE = {"enum": list(usage.SCOPES)}


@operation(
    "what is used, and what may be; without an id the largest of the scope first",
    {200: record({"data": {"type": "array", "items": SHARE}})},
    parameters=[
        query("scope", {**SCOPE, "default": "organization"}, "whose"),
        query("id", STRING, "a user's is WORKSPACE/USER"),
        LIMIT,
    ],
)
@admins
async def show_usage(request: Request) -> JSON:
    """GET /v1/organizations/usage"""
    database = _store(request).database
    scope, id = _asked(request, "scope") or "organization", _asked(request, "id")
    if id is None:
        found = await usage.largest(database, scope, limit_of(request))
    else:
        found = [await usage.share_of(database, scope, id)]
    return JSON({"data": [share_body(share) for share in found]})


@operation(
    "set limits of bytes and files; null takes one away",
    {200: SHARE},
    body=record({"scope": SCOPE, "id": nullable(STRING), **LIMITS}, optional=["id", *LIMITS]),
)
@admins
async def change_limits(request: Request) -> JSON:
    """POST /v1/organizations/limits"""
    given = await _given(request, {"scope", "id", *LIMITS})
    scope, id = given.pop("scope", None), given.pop("id", None)
    for name, value in (("scope", scope), ("id", id)):
        if not isinstance(value, str) and not (name == "id" and value is None):
            raise BadInput(f"{name}: {value!r} is none; expected a text")
    return JSON(share_body(await usage.change_limits(_store(request).database, scope, id, given, **_who(request))))


# -- the audit log ---------------------------------------------------------------------------------------------------------------


@operation(
    "entries of the audit log, newest first",
    {200: record({"data": {"type": "array", "items": ENTRY}, "has_more": BOOLEAN})},
    parameters=[
        LIMIT,
        query("before", {"type": "integer", "minimum": 1}, "only entries before this sequence number"),
        query("workspace_id", STRING, "only entries of this workspace"),
        query("action", {"enum": sorted(audit.ACTIONS)}, "only entries of this action"),
    ],
)
@admins
async def list_entries(request: Request) -> JSON:
    """GET /v1/organizations/audit"""
    before, limit = _asked(request, "before"), limit_of(request)
    if before is not None and not re.fullmatch(r"[0-9]{1,18}", before):
        raise BadInput(f"before: '{before[:40]}' is no sequence number; expected a whole number")
    found = await audit.entries(
        _store(request).database,
        limit=limit + 1,
        before=int(before) if before else None,
        workspace_id=_asked(request, "workspace_id"),
        action=_asked(request, "action"),
        newest=True,
    )
    return JSON({"data": found[:limit], "has_more": len(found) > limit})


@operation("check the audit log from its first entry", {200: REPORT})
@admins
async def verify_entries(request: Request) -> JSON:
    """GET /v1/organizations/audit/verify"""
    store = _store(request)
    report = await audit.verify(store.database)
    return JSON(report_body(report, await audit.signed_head(store.database, store.signing_key)))


@operation(
    "the whole audit log, one JSON object a line, and last its signed head", {200: STRING}, answer_media="application/x-ndjson"
)
@admins
async def export_entries(request: Request) -> Response:
    """GET /v1/organizations/audit/export"""
    store = _store(request)

    async def lines() -> AsyncIterator[str]:
        async for line in audit.export(store.database, store.signing_key):
            yield json.dumps(line, separators=(",", ":")) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _who(request: Request) -> dict[str, Any]:
    return {"by": caller_of(request), "request_id": request.state.request_id}


def _id(request: Request) -> str:
    id: str = next(iter(request.path_params.values()))
    return id[:200].replace("\0", "")


def _asked(request: Request, name: str) -> str | None:
    """A parameter of the query; None if it is not there or empty."""
    text = request.query_params.get(name) or None
    if text is not None and not TEXT.fullmatch(text):
        raise BadInput(f"{name}: {text[:40]!r} cannot be one")
    return text


async def _given(request: Request, known: set[str]) -> dict[str, Any]:
    """The body; what nobody here reads is refused unless it is null."""
    found = await body.read_json(request)
    for name, value in found.items():
        if name not in known and value is not None:
            raise BadInput(f"{name[:60]!r} is nothing that can be set here; expected {', '.join(sorted(known))}")
        if isinstance(value, str) and not TEXT.fullmatch(value):
            raise BadInput(f"{name[:60]}: {value[:40]!r} cannot be one")
    return {name: value for name, value in found.items() if name in known}


def _flag(request: Request, name: str, usual: bool) -> bool:
    text = request.query_params.get(name)
    flags: Mapping[str | None, bool] = {None: usual, "true": True, "false": False}
    if text not in flags:
        raise BadInput(f"{name}: '{text[:40] if text else text}' is neither true nor false")
    return flags[text]


def _expiry(seconds: Any) -> int | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not 1 <= seconds <= 10**9:
        raise BadInput(f"expires_in_seconds: {seconds!r} is none; expected a whole number from 1 to 1,000,000,000")
    return now() + seconds * 1_000_000


PREFIX = "/v1/organizations"
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
    Route(f"{PREFIX}/usage", show_usage),
    Route(f"{PREFIX}/limits", change_limits, methods=["POST"]),
    Route(f"{PREFIX}/audit", list_entries),
    Route(f"{PREFIX}/audit/verify", verify_entries),
    Route(f"{PREFIX}/audit/export", export_entries),
]
