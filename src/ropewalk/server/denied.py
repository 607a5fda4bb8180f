"""Refusals on their way into the audit log."""

from __future__ import annotations

import logging
import re

from starlette.requests import Request

from ropewalk.errors import AuthenticationFailed, FileExpired, NotFound, PermissionDenied
from ropewalk.server import logs
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.denials import Denials

OUTCOMES = {AuthenticationFailed: "wrong_key", PermissionDenied: "missing_right", NotFound: "no_such_id"}
ID = re.compile(r"(file|wrkspc|key|up|upload)_[A-Za-z0-9]{1,64}")


async def write_down(request: Request, error: BaseException, caller: Caller | None = None, subject: str | None = None) -> None:
    """An entry of the audit log if the error is a refusal; called when it has been answered, so that it takes no time from there."""
    outcome = next((told for kind, told in OUTCOMES.items() if isinstance(error, kind)), None)
    if outcome is None or isinstance(error, FileExpired):
        return
    denials: Denials = request.app.state.denials
    caller = caller or getattr(request.state, "caller", None)
    try:
        await denials.tell(caller, subject_of(request, subject), outcome, request.state.request_id)
    except Exception as failure:  # the client has its answer; whoever runs the server must hear of this
        logs.event("audit_failed", logging.ERROR, failure, request_id=request.state.request_id)


def subject_of(request: Request, named: str | None = None) -> str:
    """The id that was asked for, or else the route: never a stranger's words, which might be a file's name."""
    for value in (named, *request.scope.get("path_params", {}).values()):
        if isinstance(value, str) and ID.fullmatch(value):
            return value
    return str(getattr(request.scope.get("route"), "path_format", "none"))
