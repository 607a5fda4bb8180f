"""What goes beyond the Claude Files API: details, tags, deletion of many, what is used of the quotas, resumable uploads.

None of it shows unless it is asked for: these are paths of their own, and no id of a file looks like one of them.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ropewalk.database import timestamp
from ropewalk.errors import BadInput, NotFound
from ropewalk.files import catalog, receipts
from ropewalk.files.store import Store
from ropewalk.server import body, tus
from ropewalk.server.auth import caller_of
from ropewalk.server.denied import write_down
from ropewalk.server.openapi import STRING, TIME, named, nullable, operation, record
from ropewalk.server.upload import MAX_TAG, MAX_TAGS, checked_tags
from ropewalk.server.wire import EXTENDED, JSON, failure, file_deleted, file_metadata
from ropewalk.tenants import quotas

MAX_DELETED = 100
COUNT = {"type": "integer", "minimum": 0}
LIMIT = nullable(COUNT)
TAGS = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": MAX_TAG}, "maxItems": MAX_TAGS}
IDS = {"type": "array", "items": STRING, "minItems": 1, "maxItems": MAX_DELETED}
USAGE = record(
    {
        "used_bytes": COUNT,
        "reserved_bytes": COUNT,
        "used_files": COUNT,
        "reserved_files": COUNT,
        "limit_bytes": LIMIT,
        "limit_files": LIMIT,
    }
)


@operation(
    "everything that is known about a file: SHA-256, tags, user, whether it has expired, who shares its bytes",
    {
        200: {
            "allOf": [
                named("File"),
                record({"shared_with": COUNT, "verified_at": nullable(TIME), "damaged_at": nullable(TIME)}),
            ]
        }
    },
)
async def details(request: Request) -> JSON:
    """GET /v1/files/{file_id}/details"""
    store: Store = request.app.state.store
    caller = caller_of(request)
    file = await store.show(caller, request.path_params["file_id"])
    async with store.database.reading() as connection:
        more = await catalog.details(connection, caller, file)
    found = file_metadata(file, EXTENDED)
    found |= {"purpose": file.purpose, "lineage": file.lineage}
    found["shared_with"] = more.shared_with
    found["verified_at"] = None if more.verified_at is None else timestamp(more.verified_at)
    found["damaged_at"] = None if more.damaged_at is None else timestamp(more.damaged_at)
    return JSON(found)


@operation("replace the tags of a file", {200: named("File")}, body=record({"tags": TAGS}))
async def replace_tags(request: Request) -> JSON:
    """PUT /v1/files/{file_id}/tags"""
    store: Store = request.app.state.store
    caller = caller_of(request)
    caller.needs("write")
    tags = checked_tags(_strings(await body.read_json(request), "tags"))
    async with store.database.writing() as connection:
        file = await catalog.replace_tags(connection, caller, request.path_params["file_id"], tags)
    return JSON(file_metadata(file, EXTENDED))


@operation(
    "delete several files; each is answered for, with its receipt or with the error that its own DELETE would have had",
    {200: record({"data": {"type": "array", "items": {"type": "object"}}})},
    body=record({"ids": IDS}),
)
async def delete_many(request: Request) -> JSON:
    """POST /v1/files/delete"""
    store: Store = request.app.state.store
    caller = caller_of(request)
    caller.needs("write")
    ids = list(dict.fromkeys(_strings(await body.read_json(request), "ids")))
    if not 1 <= len(ids) <= MAX_DELETED:
        raise BadInput(f"ids: {len(ids)} different ones; expected 1 to {MAX_DELETED}")
    answers: list[dict[str, Any]] = []
    for id in ids:
        try:
            receipt = await store.delete(caller, id, request.state.request_id)
            answers.append(file_deleted(id, receipt.as_dict(), EXTENDED))
        except NotFound as error:
            answers.append({"id": id, **failure(error).body(request.state.request_id)})
            await write_down(request, error, caller, id)
    return JSON({"data": answers})


@operation(
    "what is used of the quotas, and what they are; a scope that does not apply to the caller is null",
    {200: record({"type": {"const": "usage"}, "workspace": USAGE, "key": nullable(USAGE), "user": nullable(USAGE)})},
)
async def usage(request: Request) -> JSON:
    """GET /v1/files/usage"""
    store: Store = request.app.state.store
    caller = caller_of(request)
    caller.needs("read")
    found: dict[str, Any] = {"type": "usage", "workspace": None, "key": None, "user": None}
    async with store.database.reading() as connection:
        for scope, id in quotas.scopes(caller):
            if scope in found:  # what other workspaces of the organisation use is not this caller's to know
                used = await quotas.usage(connection, scope, id)
                found[scope] = {name: getattr(used, name) for name in quotas.Usage.__dataclass_fields__}
    return JSON(found)


def _strings(content: dict[str, Any], name: str) -> list[str]:
    """The one key of a body that is a list of strings."""
    values = content.get(name)
    if set(content) != {name} or not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadInput(f'the body is expected to be {{"{name}": [...]}}, a list of strings and nothing else')
    return values


@operation(
    "the public key that the receipts of deletions are verified with",
    {
        200: record(
            {"type": {"const": "receipt_key"}, "algorithm": {"const": "Ed25519"}, "key_id": STRING, "public_key": STRING}
        )
    },
)
async def receipt_key(request: Request) -> JSON:
    """GET /v1/files/receipt_key"""
    return JSON(receipts.key_as_dict(request.app.state.store.signing_key.public_key()))


routes: list[BaseRoute] = [  # before those of files.py, which take any word for an id
    Route("/v1/files/usage", usage),
    Route("/v1/files/receipt_key", receipt_key),
    Route("/v1/files/delete", delete_many, methods=["POST"]),
    *tus.routes,
    Route("/v1/files/{file_id}/details", details),
    Route("/v1/files/{file_id}/tags", replace_tags, methods=["PUT"]),
]
