"""What is used and may be, and what was done: usage, limits and the audit log, for whoever administers."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from ropewalk.errors import BadInput
from ropewalk.server.admin_requests import LIMIT, PREFIX, admins, asked_of, given_in, store_of, who
from ropewalk.server.files import limit_of
from ropewalk.server.openapi import STRING, nullable, operation, query, record
from ropewalk.server.wire import JSON
from ropewalk.server.wire_admin import BOOLEAN, ENTRY, LIMITS, REPORT, SHARE, report_body, share_body
from ropewalk.tenants import audit, usage

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
    database = store_of(request).database
    scope, id = asked_of(request, "scope") or "organization", asked_of(request, "id")
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
    given = await given_in(request, {"scope", "id", *LIMITS})
    scope, id = given.pop("scope", None), given.pop("id", None)
    for name, value in (("scope", scope), ("id", id)):
        if not isinstance(value, str) and not (name == "id" and value is None):
            raise BadInput(f"{name}: {value!r} is none; expected a text")
    return JSON(share_body(await usage.change_limits(store_of(request).database, scope, id, given, **who(request))))


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
    before, limit = asked_of(request, "before"), limit_of(request)
    if before is not None and not re.fullmatch(r"[0-9]{1,18}", before):
        raise BadInput(f"before: '{before[:40]}' is no sequence number; expected a whole number")
    found = await audit.entries(
        store_of(request).database,
        limit=limit + 1,
        before=int(before) if before else None,
        workspace_id=asked_of(request, "workspace_id"),
        action=asked_of(request, "action"),
        newest=True,
    )
    return JSON({"data": found[:limit], "has_more": len(found) > limit})


@operation("check the audit log from its first entry", {200: REPORT})
@admins
async def verify_entries(request: Request) -> JSON:
    """GET /v1/organizations/audit/verify"""
    store = store_of(request)
    report = await audit.verify(store.database)
    return JSON(report_body(report, await audit.signed_head(store.database, store.signing_key)))


@operation(
    "the whole audit log, one JSON object a line, and last its signed head", {200: STRING}, answer_media="application/x-ndjson"
)
@admins
async def export_entries(request: Request) -> Response:
    """GET /v1/organizations/audit/export"""
    store = store_of(request)

    async def lines() -> AsyncIterator[str]:
        async for line in audit.export(store.database, store.signing_key):
            yield json.dumps(line, separators=(",", ":")) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


routes: list[BaseRoute] = [
    Route(f"{PREFIX}/usage", show_usage),
    Route(f"{PREFIX}/limits", change_limits, methods=["POST"]),
    Route(f"{PREFIX}/audit", list_entries),
    Route(f"{PREFIX}/audit/verify", verify_entries),
    Route(f"{PREFIX}/audit/export", export_entries),
]
