"""The weekly digest, as the server sends it; and the two links in its mails, which need no signing in: confirm, and unsubscribe.

Opening a link changes nothing, since mail programs and filters open links by themselves: what changes something is the form behind it,
or the POST that a mail program sends when somebody unsubscribes there (RFC 8058). Each carries its token, which nobody can guess.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare.digest_sending import send_due
from ropewalk.compare.mail import Mailer
from ropewalk.compare.subscribers import confirm, unsubscribe
from ropewalk.errors import TooLarge
from ropewalk.server import body, logs
from ropewalk.server.settings import ServerSettings
from ropewalk.server.visitors import address, anyone, show, store_of

FORM_BYTES = 16_384


@dataclass(frozen=True)
class DigestLinkPage:
    """/digest/confirm, /digest/unsubscribe"""

    heading: str
    text: str
    button: str  # "": it is done
    action: str = ""


def mailer_of(settings: ServerSettings) -> Mailer | None:
    """What sends mail, where the server was told how."""
    return Mailer(settings.mail) if settings.mail is not None else None


async def send_digests(app: Starlette) -> None:
    """Looks now and then whether a digest is due; which of several processes sends it, the database decides."""
    settings: ServerSettings = app.state.settings
    if app.state.mailer is None:
        return
    while True:
        await asyncio.sleep(settings.digest_seconds)
        try:
            done = await send_due(app.state.store, app.state.mailer)
            if done.sent or done.failed or done.refused:
                logs.event("digest", sent=done.sent, failed=done.failed, refused=done.refused)
        except Exception as error:  # the next round tries again
            logs.event("digest_failed", logging.ERROR, error)


async def confirm_form(request: Request) -> Response:
    page = DigestLinkPage(
        "The weekly digest", "Once a week, when something has changed, and with a link to end it.", "Yes, send it to me"
    )
    return await _asked(request, page)


async def confirmed(request: Request) -> Response:
    await _read(request)
    await confirm(store_of(request), _token(request))
    return await _done(request, "You will get the digest", "It comes once a week, when something has changed.")


async def unsubscribe_form(request: Request) -> Response:
    page = DigestLinkPage("Unsubscribe", "No digest will come any more, and your address is erased.", "Unsubscribe")
    return await _asked(request, page)


async def unsubscribed(request: Request) -> Response:
    await _read(request)
    await unsubscribe(store_of(request), _token(request))
    return await _done(request, "You are unsubscribed", "No digest will come any more, and your address is erased.")


async def _asked(request: Request, page: DigestLinkPage) -> Response:
    action = address(request.url.path, {"token": _token(request)})
    shown = DigestLinkPage(page.heading, page.text, page.button, action)
    return await show(request, None, "digest_link.html", page.heading, shown)


async def _done(request: Request, heading: str, text: str) -> Response:
    return await show(request, None, "digest_link.html", heading, DigestLinkPage(heading, text, ""))


async def _read(request: Request) -> None:
    """A mail program says why it comes, in a form of either kind; the token says all."""
    length = 0
    async for chunk in body.read(request):
        length += len(chunk)
        if length > FORM_BYTES:
            raise TooLarge(f"this form has more than {FORM_BYTES:,} bytes")


def _token(request: Request) -> str:
    return request.query_params.get("token", "")[:200]


routes: list[BaseRoute] = [
    Route("/digest/confirm", anyone(confirm_form), methods=["GET"]),
    Route("/digest/confirm", anyone(confirmed), methods=["POST"]),
    Route("/digest/unsubscribe", anyone(unsubscribe_form), methods=["GET"]),
    Route("/digest/unsubscribe", anyone(unsubscribed), methods=["POST"]),
]
