"""Errors and headers as OpenAI's clients read them, of everything under /openai/v1."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ropewalk.server.wire import JSON, Failure, failure
from ropewalk.tenants.limits import Allowance

PREFIX = "/openai/v1/"
OVERLOADED = 503  # where the Claude API has 529
# Our types -> theirs, with the code of an error that has none of its own.
KINDS: dict[str, tuple[str, str | None]] = {
    "authentication_error": ("invalid_request_error", "invalid_api_key"),
    "permission_error": ("invalid_request_error", "insufficient_permissions"),
    "not_found_error": ("invalid_request_error", "not_found"),
    "request_too_large": ("invalid_request_error", "request_too_large"),
    "rate_limit_error": ("requests", "rate_limit_exceeded"),
    "overloaded_error": ("server_error", "overloaded"),
    "timeout_error": ("server_error", "timeout"),
    "api_error": ("server_error", None),
}


def is_openai(path: str) -> bool:
    """Whether whoever asks for this path speaks as OpenAI's clients do."""
    return path.startswith(PREFIX)


def status_of(shown: Failure) -> int:
    """The status that OpenAI's clients expect."""
    return OVERLOADED if shown.type == "overloaded_error" else shown.status


def error_body(shown: Failure, param: str | None = None) -> dict[str, Any]:
    """The envelope of an error; `param` is where in the request it stands."""
    kind, code = KINDS.get(shown.type, ("invalid_request_error", None))
    return {"error": {"message": shown.message, "type": kind, "param": param, "code": shown.error_code or code}}


def error_of(error: BaseException) -> dict[str, Any]:
    """The envelope of an exception, also in the middle of a stream."""
    return error_body(failure(error), getattr(error, "param", None))


def refusal(shown: Failure, error: BaseException, headers: dict[str, str]) -> JSON:
    """The whole answer."""
    return JSON(error_body(shown, getattr(error, "param", None)), status_of(shown), headers)


def headers_of(request_id: str, allowance: Allowance) -> dict[str, str]:
    """What every answer carries: its id where OpenAI's clients look for it, and what is left of the rate."""
    values = {"x-request-id": request_id}
    if allowance.limit is not None:
        wait = max(0.0, (datetime.fromisoformat(allowance.reset) - datetime.now(UTC)).total_seconds())
        told = {"limit": str(allowance.limit), "remaining": str(allowance.remaining), "reset": f"{wait:.0f}s"}
        values |= {f"x-ratelimit-{name}-requests": value for name, value in told.items()}
    return values
