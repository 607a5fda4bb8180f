"""Who looks at a page: a browser with a session, and the key behind it; and what every page has around it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ropewalk.errors import AuthenticationFailed, BadInput, NotFound, RopewalkError, TooLarge
from ropewalk.files.store import Store
from ropewalk.server import body, sessions, views, wire, words
from ropewalk.server.denied import write_down
from ropewalk.server.sessions import Session
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.keys import Key, admit, find_key
from ropewalk.tenants.workspaces import Workspace, list_workspaces

FORM_BYTES = 16_384  # of a form without files
FORM_FIELDS = 16
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not `no-referrer`: with it browsers hide even from us which page a form came from.
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Visitor:
    """Who is signed in, and what that key may do now."""

    session: Session
    key: Key
    caller: Caller
    workspace: Workspace

    def may(self, right: str) -> bool:
        return right in self.caller.rights


Page = Callable[[Request, Visitor], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


def signed_in(page: Page) -> Endpoint:
    """A page for who has signed in; others are led to do so, and errors become pages."""

    async def endpoint(request: Request) -> Response:
        session = sessions.read(request, store_of(request).vault)
        visitor = None
        try:
            if session is None or (visitor := await visitor_of(request, session)) is None:
                return _guarded(_sign_in_first(request))
            request.app.state.limits.take(visitor.workspace.id, visitor.workspace.requests_per_minute)
            return _guarded(await page(request, visitor))
        except RopewalkError as error:
            return _guarded(await _refusal(request, visitor, error))

    return endpoint


def anyone(page: Endpoint) -> Endpoint:
    """A page for everybody, with the same headers around it."""

    async def endpoint(request: Request) -> Response:
        try:
            return _guarded(await page(request))
        except RopewalkError as error:
            return _guarded(await _refusal(request, None, error))

    return endpoint


def signed_in_or_not(page: Callable[[Request, Visitor | None], Awaitable[Response]]) -> Endpoint:
    """A page for everybody, which knows who is signed in."""

    async def endpoint(request: Request) -> Response:
        session = sessions.read(request, store_of(request).vault)
        visitor = await visitor_of(request, session) if session is not None else None
        try:
            return _guarded(await page(request, visitor))
        except RopewalkError as error:
            return _guarded(await _refusal(request, visitor, error))

    return endpoint


async def visitor_of(request: Request, session: Session) -> Visitor | None:
    """The key of a session as it is now; None when it opens nothing any more."""
    if session.key_id is None:
        return None
    async with store_of(request).database.reading() as connection:
        try:
            key = await find_key(connection, session.key_id)
            if key.status != "active":
                return None
            caller, workspace = await admit(connection, key, session.workspace_id)
        except NotFound:  # the key, or the workspace, is no more
            return None
    request.state.caller = caller  # for the log and the headers of the answer
    return Visitor(session, key, caller, workspace)


async def show(
    request: Request, visitor: Visitor | None, template: str, title: str, page: object, token: str = ""
) -> HTMLResponse:
    """A page in its frame."""
    who = None
    if visitor is not None:
        token = visitor.session.token
        spaces = [visitor.workspace]
        if visitor.key.workspace_id is None:
            spaces = sorted((await list_workspaces(store_of(request).database)).items, key=lambda found: found.name.casefold())
        choices = tuple(views.Choice(found.id, found.name) for found in spaces)
        who = views.Who(visitor.key.name, visitor.workspace.id, visitor.workspace.name, choices)
    return HTMLResponse(views.render(template, views.Frame(title, token, who, request.url.path), page))


async def read_form(request: Request, session: Session) -> dict[str, str]:
    """The fields of a form without files; refused unless our own page sent it, with the token of this session."""
    return dict(await read_fields(request, session, FORM_BYTES, FORM_FIELDS))


async def read_fields(request: Request, session: Session, most_bytes: int, most_fields: int) -> list[tuple[str, str]]:
    """The same, where a field may come several times."""
    fields = await _read_fields(request, most_bytes, most_fields)
    sessions.check_token(session, dict(fields).get("csrf"))
    return fields


async def read_open_form(request: Request) -> dict[str, str]:
    """The fields of a form of somebody who is not signed in: it must carry a secret of its own."""
    return dict(await _read_fields(request, FORM_BYTES, FORM_FIELDS))


async def _read_fields(request: Request, most_bytes: int, most_fields: int) -> list[tuple[str, str]]:
    sessions.check_origin(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise BadInput("this form is expected as application/x-www-form-urlencoded, as browsers send it")
    content = bytearray()
    async for chunk in body.read(request):
        content += chunk
        if len(content) > most_bytes:
            raise TooLarge(f"this form has more than {most_bytes:,} bytes")
    try:
        return parse_qsl(content.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=most_fields)
    except ValueError as error:
        raise BadInput(f"this form cannot be read: {error}") from error


def origin(request: Request) -> str:
    """This server's address, as the browser has it."""
    return f"{'https' if sessions.by_tls(request) else 'http'}://{request.url.netloc}"


def store_of(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def wants_json(request: Request) -> bool:
    """Whether a script asks, which shows the words of an error itself."""
    return "application/json" in request.headers.get("accept", "")


def address(path: str, query: dict[str, Any]) -> str:
    """A path with its query."""
    return f"{path}?{urlencode(query, doseq=True)}" if query else path


def _guarded(response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _sign_in_first(request: Request) -> Response:
    if wants_json(request):
        error = AuthenticationFailed("the session has ended: load the page again and sign in")
        return wire.JSON(wire.error_body(error, request_id_of(request)), 401)
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    target = address("/login", {"next": back} if request.method == "GET" and back != "/" else {})
    if "hx-request" in request.headers:  # htmx would put the sign-in form where the table was
        return Response(status_code=204, headers={"hx-redirect": "/login"})
    return RedirectResponse(target, 303)


async def _refusal(request: Request, visitor: Visitor | None, error: RopewalkError) -> Response:
    failure = wire.failure(error)
    refused = BackgroundTask(write_down, request, error, visitor.caller if visitor else None)
    if wants_json(request):
        return wire.JSON(failure.body(request_id_of(request)), failure.status, background=refused)
    try:
        heading = HTTPStatus(failure.status).phrase
    except ValueError:
        heading = "Busy"
    response = await show(request, visitor, "error.html", heading, views.ErrorPage(heading, words.sentence(failure.message)))
    response.status_code, response.background = failure.status, refused
    if failure.retry_after is not None:
        response.headers["retry-after"] = str(math.ceil(failure.retry_after))
    return response


def request_id_of(request: Request) -> str:
    found: str = request.state.request_id
    return found
