"""Who asks: a key in `x-api-key` or `Authorization: Bearer`, the workspace it opens, and the user it may act for."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request

from ropewalk.errors import AuthenticationFailed, RateLimited
from ropewalk.files.store import Store
from ropewalk.server.openai_errors import is_openai
from ropewalk.tenants import keys
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.limits import Allowance, Limits


async def admit(request: Request) -> None:
    """Sets `request.state.caller`, counts the request against its workspace's limit, or raises."""
    store: Store = request.app.state.store
    limits: Limits = request.app.state.limits
    headers = request.headers
    secret = secret_of(headers)
    async with store.database.reading() as connection:
        key = await keys.authenticate(connection, store.pepper, secret)
        if key is None:
            raise AuthenticationFailed("this key opens nothing: it is unknown, revoked or expired")
        # What OpenAI's clients call a project is a workspace here.
        named = headers.get("openai-project" if is_openai(request.url.path) else "anthropic-workspace-id")
        caller, workspace = await keys.admit(connection, key, named or None, headers.get("anthropic-user-id") or None)
    request.state.caller = caller
    try:
        request.state.allowance = limits.take(workspace.id, workspace.requests_per_minute)
    except RateLimited:
        request.state.allowance = limits.left(workspace.id)
        raise


def secret_of(headers: Headers) -> str:
    """The key that a request carries."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    secret = headers.get("x-api-key", "").strip() or (credentials.strip() if scheme.lower() == "bearer" else "")
    if not secret:
        raise AuthenticationFailed("no key: send one as `x-api-key: KEY` or as `Authorization: Bearer KEY`")
    return secret


def caller_of(request: Request) -> Caller:
    """Who asks, on a route that needs a key."""
    caller: Caller = request.state.caller
    return caller


def allowance_of(request: Request) -> Allowance:
    """What the workspace has left of its requests; nothing is said of that before it is known."""
    return getattr(request.state, "allowance", None) or Allowance()
