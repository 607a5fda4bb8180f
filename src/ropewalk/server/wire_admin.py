"""The JSON of the Admin API in the shapes that its clients read, and of what goes beyond it."""

from __future__ import annotations

from typing import Any

from ropewalk.database import timestamp
from ropewalk.server.openapi import STRING, TIME, Schema, nullable, record
from ropewalk.tenants import usage
from ropewalk.tenants.audit import AuditReport
from ropewalk.tenants.keys import Key
from ropewalk.tenants.usage import Share
from ropewalk.tenants.workspaces import OF_JOBS, Workspace

NUMBER: Schema = {"type": "integer", "minimum": 0}
BOOLEAN: Schema = {"type": "boolean"}
STRINGS: Schema = {"type": "array", "items": STRING}
LIMITS = {name: nullable(NUMBER) for name in usage.LIMITS}

ORGANIZATION = record({"id": STRING, "type": {"const": "organization"}, "name": STRING})
WORKSPACE = record(
    {
        "id": STRING,
        "type": {"const": "workspace"},
        "name": STRING,
        "created_at": TIME,
        "archived_at": nullable(TIME),
        "requests_per_minute": nullable(NUMBER),
        "downloads": {"enum": ["owner", "nobody"]},
        **{name: nullable(NUMBER) for name in OF_JOBS},
    }
)
API_KEY = record(
    {
        "id": STRING,
        "type": {"const": "api_key"},
        "name": STRING,
        "status": {"enum": ["active", "expired", "archived"]},
        "created_at": TIME,
        "expires_at": nullable(TIME),
        "partial_key_hint": STRING,
        "workspace_id": nullable(STRING),
        "rights": STRINGS,
        "user_id": nullable(STRING),
    }
)
NEW_API_KEY = {**API_KEY, "properties": {**API_KEY["properties"], "key": {"type": "string", "description": "shown only now"}}}
SHARE = record(
    {
        "type": {"const": "usage"},
        "scope": STRING,
        "id": STRING,
        "used_bytes": NUMBER,
        "reserved_bytes": NUMBER,
        "used_files": NUMBER,
        "reserved_files": NUMBER,
        **LIMITS,
    }
)
ENTRY = record(
    {
        "seq": NUMBER,
        "at": NUMBER,
        "organization_id": nullable(STRING),
        "workspace_id": nullable(STRING),
        "key_id": nullable(STRING),
        "user_id": nullable(STRING),
        "action": STRING,
        "subject": STRING,
        "outcome": STRING,
        "request_id": STRING,
        "detail": {"type": "object"},
        "previous": STRING,
        "digest": STRING,
    }
)
REPORT = record({"type": {"const": "audit_report"}, "entries": NUMBER, "faults": STRINGS, "head": {"type": "object"}})


def page(item: Schema) -> Schema:
    """A list of these in the shape of the Admin API."""
    ends = {"first_id": nullable(STRING), "last_id": nullable(STRING)}
    return record({"data": {"type": "array", "items": item}, "has_more": {"type": "boolean"}, **ends})


def page_body(items: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """Part of a list."""
    ends = {"first_id": items[0]["id"] if items else None, "last_id": items[-1]["id"] if items else None}
    return {"data": items, "has_more": more, **ends}


def workspace_body(workspace: Workspace) -> dict[str, Any]:
    """A workspace; keys of the Admin API that mean nothing here are there, and empty."""
    return {
        "id": workspace.id,
        "type": "workspace",
        "name": workspace.name,
        "created_at": timestamp(workspace.created_at),
        "archived_at": _time(workspace.archived_at),
        "compartment_id": workspace.id,  # each has a key of its own
        "data_residency": None,
        "display_color": f"#{hash_color(workspace.id)}",
        "external_key_id": None,
        "tags": {},
        "user_profile_id": None,
        "requests_per_minute": workspace.requests_per_minute,
        "downloads": workspace.downloads,
        **{name: getattr(workspace, name) for name in OF_JOBS},
    }


def key_body(key: Key, secret: str | None = None) -> dict[str, Any]:
    """A key; its secret only at its making."""
    everywhere = key.workspace_id is None
    return {
        "id": key.id,
        "type": "api_key",
        "name": key.name,
        "status": key.status,
        "created_at": timestamp(key.created_at),
        "created_by": None,
        "expires_at": _time(key.expires_at),
        "partial_key_hint": f"rw-...{key.hint}",
        "principal": {"type": "user_actor", "user_id": key.user_id} if key.user_id else None,
        "scope": {"type": "organization"} if everywhere else {"type": "workspace", "workspace_id": key.workspace_id},
        "workspace_id": key.workspace_id,
        "rights": sorted(key.rights),
        "user_id": key.user_id,
    } | ({"key": secret} if secret else {})


def share_body(share: Share) -> dict[str, Any]:
    """What something uses and may use."""
    return {"type": "usage", "scope": share.scope, "id": share.id, **share.usage.__dict__}


def report_body(report: AuditReport, head: dict[str, Any]) -> dict[str, Any]:
    """What a check of the audit log found, and the signed head to keep."""
    return {"type": "audit_report", "entries": report.entries, "faults": list(report.faults), "head": head}


def hash_color(id: str) -> str:
    """A colour for an id, always the same."""
    return f"{sum(ord(letter) << (index % 3 * 8) for index, letter in enumerate(id)) % (1 << 24):06X}"


def _time(microseconds: int | None) -> str | None:
    return None if microseconds is None else timestamp(microseconds)
