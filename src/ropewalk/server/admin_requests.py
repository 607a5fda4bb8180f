"""What requests of administration have in common: who may make them, and how their queries and bodies are read."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ropewalk.errors import BadInput
from ropewalk.files.store import Store
from ropewalk.server import body
from ropewalk.server.auth import caller_of
from ropewalk.server.files import DEFAULT_LIMIT, MAX_LIMIT
from ropewalk.server.openapi import query

PREFIX = "/v1/organizations"
TEXT = re.compile(r"[^\x00\ud800-\udfff]{0,1000}")  # what every database can hold
LIMIT = query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}, "how many at once")
Handler = Callable[[Request], Awaitable[Response]]


def admins(handler: Handler) -> Handler:
    """Asks for the right 'admin' first."""

    @wraps(handler)
    async def asked(request: Request) -> Response:
        caller_of(request).needs("admin")
        return await handler(request)

    return asked


def store_of(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def who(request: Request) -> dict[str, Any]:
    return {"by": caller_of(request), "request_id": request.state.request_id}


def id_of(request: Request) -> str:
    id: str = next(iter(request.path_params.values()))
    return id[:200].replace("\0", "")


def asked_of(request: Request, name: str) -> str | None:
    """A parameter of the query; None if it is not there or empty."""
    text = request.query_params.get(name) or None
    if text is not None and not TEXT.fullmatch(text):
        raise BadInput(f"{name}: {text[:40]!r} cannot be one")
    return text


async def given_in(request: Request, known: set[str]) -> dict[str, Any]:
    """The body; what nobody here reads is refused unless it is null."""
    found = await body.read_json(request)
    for name, value in found.items():
        if name not in known and value is not None:
            raise BadInput(f"{name[:60]!r} is nothing that can be set here; expected {', '.join(sorted(known))}")
        if isinstance(value, str) and not TEXT.fullmatch(value):
            raise BadInput(f"{name[:60]}: {value[:40]!r} cannot be one")
    return {name: value for name, value in found.items() if name in known}


def flag_of(request: Request, name: str, usual: bool) -> bool:
    text = request.query_params.get(name)
    flags: Mapping[str | None, bool] = {None: usual, "true": True, "false": False}
    if text not in flags:
        raise BadInput(f"{name}: '{text[:40] if text else text}' is neither true nor false")
    return flags[text]
