"""The pages that people use: sign in, files, a file, its deletion. Each works without scripts, and shows one dataclass of views.py.

A page asks the same modules as the API does, with the rights of the key that the session was opened with.
"""

from __future__ import annotations

from pathlib import Path

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from ropewalk.errors import AuthenticationFailed, BadInput, DamagedContent, NotFound, PermissionDenied, RopewalkError
from ropewalk.files import receipts
from ropewalk.files.catalog import File, Listing
from ropewalk.files.documents import document, page_image
from ropewalk.server import body, download, forms, sessions, texts, views, wire, words
from ropewalk.server.denied import write_down
from ropewalk.server.previews import Preview, preview_of
from ropewalk.server.sessions import Session
from ropewalk.server.usage import savings
from ropewalk.server.visitors import (
    Visitor,
    address,
    anyone,
    origin,
    read_form,
    request_id_of,
    show,
    signed_in,
    store_of,
    visitor_of,
    wants_json,
)
from ropewalk.tenants.keys import authenticate
from ropewalk.tenants.quotas import usage

ROWS = 50  # of a list


# -- signing in and out


async def login_form(request: Request) -> Response:
    session, target = sessions.read(request, store_of(request).vault), inside(request.query_params.get("next"))
    if session is None or session.key_id is not None:
        if session is not None and await visitor_of(request, session) is not None:
            return RedirectResponse(target, 303)
        session = sessions.begin()
    return await _login_page(request, session, target)


async def login(request: Request) -> Response:
    """A key for a session; the answer to a wrong key says no more than that."""
    store = store_of(request)
    session = sessions.read(request, store.vault)
    if session is None:
        return await _login_page(
            request, sessions.begin(), "/", "The page had been open for too long, or cookies are off. Again:"
        )
    form = await read_form(request, session)
    target = inside(form.get("next"))
    async with store.database.reading() as connection:
        key = await authenticate(connection, store.pepper, form.get("key", "").strip())
    if key is None:
        problem = "This key opens nothing here: it is mistyped, revoked or expired, or another server’s."
        response = await _login_page(request, session, target, problem)
        response.status_code, response.background = 401, BackgroundTask(write_down, request, AuthenticationFailed(problem))
        return response
    redirect = RedirectResponse(target, 303)
    sessions.write(redirect, request, store.vault, sessions.begin(key.id))
    return redirect


async def logout(request: Request, visitor: Visitor) -> Response:
    await read_form(request, visitor.session)
    response = RedirectResponse("/login", 303)
    sessions.end(response, request)
    return response


async def switch_workspace(request: Request, visitor: Visitor) -> Response:
    form = await read_form(request, visitor.session)
    chosen = sessions.in_workspace(visitor.session, form.get("workspace_id", "").replace("\0", ""))
    if await visitor_of(request, chosen) is None:
        raise NotFound(f"Workspace `{chosen.workspace_id}` not found.")
    response = RedirectResponse("/files", 303)
    sessions.write(response, request, store_of(request).vault, chosen)
    return response


# -- files


async def list_files(request: Request, visitor: Visitor) -> Response:
    store, asked = store_of(request), request.query_params
    name = asked.get("name", "").replace("\0", "")[:255]
    listing, newer, older = await _listed(request, visitor, name)
    just_now = [id.replace("\0", "") for id in asked.getlist("stored")[:64]]
    stored = await store.find(visitor.caller, just_now) if just_now else []
    tokens = await texts.tokens(store, listing.files)
    unread = texts.unread(listing.files, tokens)
    if "read" in asked:
        tokens |= await texts.count_some(store, visitor.caller, unread)
        still = texts.unread(listing.files, tokens)
        unread = still if len(still) < len(unread) else []  # what cannot be read now is asked for when the page is next opened
    saved = await savings(request, [file.id for file in listing.files])
    async with store.database.reading() as connection:
        used = await usage(connection, *_scope(visitor))
    here = {key: value for key, value in asked.items() if key in ("name", "page", "before")}
    page = views.FilesPage(
        rows=[views.row(file, tokens.get(file.id), saved[file.id].words if file.id in saved else "") for file in listing.files],
        quota=views.quota(used),
        name=name,
        here=here,
        unread=[file.id for file in unread],
        unread_at=address("/files", here | {"read": "1"}),
        newer=newer,
        older=older,
        uploaded=[views.Stored(file.id, words.parts(file.filename)) for file in reversed(stored)],
        may_write=visitor.may("write"),
        max_bytes=store.max_file_bytes,
        max_size=words.size(store.max_file_bytes),
    )
    return await show(request, visitor, "files.html", "Files", page)


async def upload(request: Request, visitor: Visitor) -> Response:
    """The files of a form, or the one of a script, each durable before the next begins."""
    sessions.check_origin(request)
    visitor.caller.needs("write")
    chunks, stored = body.read(request), list[File]()
    try:
        await forms.receive(request, visitor, chunks, stored)
    except RopewalkError as error:
        if not isinstance(error, PermissionDenied):
            async for _ in chunks:  # a browser that still sends hears no answer
                pass
        if stored:
            said = "the file before it is stored" if len(stored) == 1 else f"the {len(stored)} files before it are stored"
            error.args = (f"{error} ({said})",)
        raise
    if not stored:
        raise BadInput("no file was chosen: choose one or more, then upload")
    if wants_json(request):
        return wire.JSON({"data": [wire.file_metadata(file, wire.Dialect()) for file in stored]})
    return RedirectResponse(address("/files", {"stored": [file.id for file in stored]}), 303)


async def show_file(request: Request, visitor: Visitor) -> Response:
    """One file with its text: at once if it has been read before or is asked for, else fetched once the page is shown."""
    store, id, start = store_of(request), request.path_params["id"], _number(request.query_params.get("from", "0"))
    found = await store.show(visitor.caller, id)
    known = await texts.tokens(store, [found])
    preview, later = Preview(), None
    if found.expired:
        preview = Preview(problem="The content is erased.")
    elif "from" not in request.query_params and not known:
        later = f"/files/{id}?from=0"
    else:
        known |= await texts.count_some(store, visitor.caller, [] if known else [found])
        try:
            preview = preview_of(await document(store, visitor.caller, id), f"/files/{id}", start)
        except (BadInput, DamagedContent) as error:
            preview = Preview(problem=words.sentence(wire.failure(error).message))
    saved = (await savings(request, [id])).get(id)
    page = views.file_page(
        found,
        known.get(id),
        preview,
        later,
        base=origin(request),
        may_download=found.downloadable and not found.expired and visitor.may("download"),
        may_write=visitor.may("write"),
        asked=saved.words if saved is not None else "",
        read=saved.read if saved is not None else "",
    )
    return await show(request, visitor, "file.html", found.filename, page)


async def download_file(request: Request, visitor: Visitor) -> Response:
    store, id = store_of(request), request.path_params["id"]
    content = await store.open_content(visitor.caller, id, download=True, request_id=request_id_of(request))
    span = download.asked_span(request, content.file)
    return await download.answer(content.file, span, content.chunks(*span) if span else content.chunks())


async def show_picture(request: Request, visitor: Visitor) -> Response:
    """A page of a PDF, or a picture, drawn anew in the confined process: no byte of the file itself reaches the browser."""
    number = _number(request.path_params["number"])
    png = await page_image(store_of(request), visitor.caller, request.path_params["id"], number)
    # Browsers put a picture that is looked at by itself into a page with styles of their own.
    return Response(
        png, media_type="image/png", headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    )


async def delete_form(request: Request, visitor: Visitor) -> Response:
    visitor.caller.needs("write")
    found = await store_of(request).show(visitor.caller, request.path_params["id"])
    page = views.DeletePage(found.id, words.parts(found.filename), words.size(found.size), words.moment(found.created_at))
    return await show(request, visitor, "delete.html", "Delete", page)


async def delete_file(request: Request, visitor: Visitor) -> Response:
    await read_form(request, visitor.session)
    id = request.path_params["id"]
    receipt = await store_of(request).delete(visitor.caller, id, request_id=request_id_of(request))
    return RedirectResponse(f"/files/{id}/receipt/{receipt.sequence}", 303)


async def show_receipt(request: Request, visitor: Visitor) -> Response:
    receipt = await _receipt(request, visitor)
    return await show(request, visitor, "receipt.html", "Receipt", views.receipt_page(receipt, f"{request.url.path}/json"))


async def download_receipt(request: Request, visitor: Visitor) -> Response:
    receipt = await _receipt(request, visitor)
    named = f'attachment; filename="receipt-{receipt.sequence}.json"'
    return Response(receipt.as_json(), media_type="application/json", headers={"content-disposition": named})


# -- what they share


async def _login_page(request: Request, session: Session, target: str, problem: str | None = None) -> Response:
    page = views.LoginPage(target, sessions.HOURS, problem)
    response = await show(request, None, "login.html", "Sign in", page, session.token)
    sessions.write(response, request, store_of(request).vault, session)
    return response


def inside(target: str | None) -> str:
    """A path of this server: a link from elsewhere must not lead elsewhere."""
    ours = target is not None and target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if ours and target is not None else "/"


async def _listed(request: Request, visitor: Visitor, name: str) -> tuple[Listing, str | None, str | None]:
    """A page of the list, and the addresses of the pages before and after it."""
    store, asked = store_of(request), request.query_params
    cursors, scope = wire.Cursors(store.cursor_key), f"pages {visitor.caller.workspace_id} {visitor.caller.user_id or ''}"
    named = {"name": name} if name else {}
    if "before" in asked:
        listing = await store.list(visitor.caller, ROWS, before=cursors.read(scope, asked["before"]), name=name or None)
        newer, older = listing.more, True
    else:
        after = cursors.read(scope, asked["page"]) if "page" in asked else None
        listing = await store.list(visitor.caller, ROWS, after=after, name=name or None)
        newer, older = after is not None, listing.more
    if not listing.files:
        return listing, address("/files", named) if newer or "before" in asked else None, None
    first, last = (cursors.write(scope, file.place) for file in (listing.files[0], listing.files[-1]))
    return (
        listing,
        address("/files", named | {"before": first}) if newer else None,
        address("/files", named | {"page": last}) if older else None,
    )


async def _receipt(request: Request, visitor: Visitor) -> receipts.Receipt:
    id, sequence = request.path_params["id"], _number(request.path_params["sequence"])
    async with store_of(request).database.reading() as connection:
        return await receipts.find(connection, visitor.caller, id, sequence)


def _scope(visitor: Visitor) -> tuple[str, str]:
    caller = visitor.caller
    return ("user", f"{caller.workspace_id}/{caller.user_id}") if caller.user_id else ("workspace", caller.workspace_id)


def _number(text: str) -> int:
    """A number from an address: one that a database can hold."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BadInput(f"'{text[:40]}' in the address is no whole number of at most 18 digits")
    return int(text)


class Static(StaticFiles):
    """Files of this package, asked for again after an upgrade."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update({"cache-control": "no-cache", "x-content-type-options": "nosniff"})
        return response


_ID = "/files/{id:str}"

routes: list[BaseRoute] = [
    Route("/login", anyone(login_form), methods=["GET"]),
    Route("/login", anyone(login), methods=["POST"]),
    Route("/logout", signed_in(logout), methods=["POST"]),
    Route("/workspace", signed_in(switch_workspace), methods=["POST"]),
    Route("/files", signed_in(list_files), methods=["GET"]),
    Route("/files", signed_in(upload), methods=["POST"]),
    Route(_ID, signed_in(show_file), methods=["GET"]),
    Route(f"{_ID}/content", signed_in(download_file), methods=["GET"]),
    Route(f"{_ID}/pages/{{number}}", signed_in(show_picture), methods=["GET"]),
    Route(f"{_ID}/delete", signed_in(delete_form), methods=["GET"]),
    Route(f"{_ID}/delete", signed_in(delete_file), methods=["POST"]),
    Route(f"{_ID}/receipt/{{sequence}}", signed_in(show_receipt), methods=["GET"]),
    Route(f"{_ID}/receipt/{{sequence}}/json", signed_in(download_receipt), methods=["GET"]),
    Mount("/static", Static(directory=Path(__file__).parent / "static")),
]
