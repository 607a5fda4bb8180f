"""Signed-in browsers: a sealed cookie that names a key, and the proof that a form was ours.

The cookie holds no secret and no right: it names the key it was opened with, and every request looks that key up again, so that a
revoked key ends its sessions at once. Whoever holds no session gets an empty one with the first form, so that signing in is
protected as every other form is. Two proofs are asked of whatever changes something: the token of the session, in the form or in a
header, and that the browser says that one of our own pages sent it.
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
from dataclasses import asdict, dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from ropewalk.database import now
from ropewalk.errors import DamagedContent, PermissionDenied
from ropewalk.vault import Vault

HOURS = 12
PURPOSE = "page session"
TOKEN_HEADER = "x-csrf-token"
# The prefix is a browser's promise that nothing but this host, over TLS, has set the cookie (RFC 6265bis, section 4.1.3.2).
SECURE, PLAIN = "__Host-ropewalk", "ropewalk"


@dataclass(frozen=True)
class Session:
    """One browser; key_id is None until it has signed in."""

    key_id: str | None
    workspace_id: str | None  # the one looked at, where the key opens several
    token: str
    ends_at: int


def begin(key_id: str | None = None, workspace_id: str | None = None) -> Session:
    """A new session, with a token of its own: what was known before signing in is worth nothing after it."""
    return Session(key_id, workspace_id, secrets.token_urlsafe(24), now() + HOURS * 3600 * 1_000_000)


def read(request: Request, vault: Vault) -> Session | None:
    """The session of a request; None for no cookie, a forged one or one whose hours have passed."""
    for name in (SECURE, PLAIN):
        text = request.cookies.get(name, "")
        try:
            sealed = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
            session = Session(**json.loads(vault.unwrap(sealed, PURPOSE)))
        except (ValueError, DamagedContent):
            continue
        if now() < session.ends_at:
            return session
    return None


def write(response: Response, request: Request, vault: Vault, session: Session) -> None:
    """Hands the session to the browser, for as long as it still lasts."""
    sealed = vault.wrap(json.dumps(asdict(session)).encode(), PURPOSE)
    secure = by_tls(request)
    name, other = (SECURE, PLAIN) if secure else (PLAIN, SECURE)
    _delete(response, {other} & set(request.cookies))
    response.set_cookie(
        name,
        base64.urlsafe_b64encode(sealed).decode("ascii").rstrip("="),  # which would have to be quoted
        max_age=max(0, (session.ends_at - now()) // 1_000_000),
        path="/",
        secure=secure,
        httponly=True,
        samesite="strict",
    )


def end(response: Response, request: Request) -> None:
    """Takes the session back from the browser."""
    _delete(response, {SECURE, PLAIN} & set(request.cookies))


def _delete(response: Response, names: set[str]) -> None:
    for name in names:
        response.delete_cookie(name, path="/", secure=name == SECURE, httponly=True, samesite="strict")


def in_workspace(session: Session, workspace_id: str) -> Session:
    """The same session, looking at another workspace."""
    return replace(session, workspace_id=workspace_id)


def check_token(session: Session, token: str | None) -> None:
    """Refuses what does not carry the token that our own forms carry."""
    if not hmac.compare_digest(session.token.encode(), (token or "").encode("utf-8", "surrogatepass")):
        raise PermissionDenied("this form is not one of this session, or an old one: go back, load the page again and repeat")


def check_origin(request: Request) -> None:
    """Refuses what another site's page may have sent."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    # A browser that sends neither has been out of use since 2020; what is no browser has an API.
    known = site is not None or origin is not None
    if not known or site not in (None, "same-origin") or (origin and origin.partition("://")[2] != request.headers.get("host")):
        raise PermissionDenied(
            f"this form came from '{origin or site or 'nowhere'}' and not from a page of this server; programs use the API under /v1"
        )


def by_tls(request: Request) -> bool:
    """Whether the browser reached us over TLS. Behind a proxy that ends it only the browser knows: it says so with each form, and by
    which cookie it was given; it could deceive but itself."""
    told = SECURE in request.cookies or request.headers.get("origin", "").startswith("https://")
    return told or request.url.scheme == "https"
