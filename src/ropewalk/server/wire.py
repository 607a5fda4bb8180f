"""The JSON of the Claude API, in the shapes that its clients read: this is the only file that knows them.

A client speaks one of three dialects, by its header `anthropic-beta`: today's; that of `files-api-2025-04-14`, whose lists have
other keys and whose files have no `expires_at`; and that of `managed-agents-2026-04-01`, whose lists have the keys of both.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from ropewalk.database import timestamp
from ropewalk.errors import (
    BadInput,
    DamagedContent,
    DocumentError,
    MissingExtra,
    OutputError,
    Overloaded,
    RateLimited,
    RopewalkError,
)
from ropewalk.files.catalog import File, Listing, Place

FIRST_VERSION = "2023-06-01"
VERSIONS = (FIRST_VERSION, "2026-10-21")
FILES_BETA = "files-api-2025-04-14"
AGENTS_BETA = "managed-agents-2026-04-01"
EXTENSIONS = "x-ropewalk-extensions"  # a request header; with it, answers hold what the Claude API does not know
MAC_BYTES = 16


@dataclass(frozen=True)
class Dialect:
    """What a client expects of an answer."""

    old_lists: bool = False  # has_more, first_id, last_id; before_id and after_id
    new_lists: bool = True  # next_page; page and ids[]
    extensions: bool = False


def dialect(headers: Headers) -> Dialect:
    """The dialect that these headers ask for; BadInput for a version that nobody knows."""
    version = headers.get("anthropic-version")
    if version is not None and version not in VERSIONS:
        raise BadInput(f"anthropic-version: '{version[:100]}' is not a version of the API; expected {' or '.join(VERSIONS)}")
    betas = {name.strip() for line in headers.getlist("anthropic-beta") for name in line.split(",")}
    return Dialect(
        old_lists=bool(betas & {FILES_BETA, AGENTS_BETA}),
        new_lists=FILES_BETA not in betas,
        extensions=headers.get(EXTENSIONS, "").lower() in ("1", "true"),
    )


EXTENDED = Dialect(extensions=True)


class JSON(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")  # halves of characters


# -- files -----------------------------------------------------------------------------------------------------------------------


def file_metadata(file: File, spoken: Dialect) -> dict[str, Any]:
    """What is told about a file."""
    found: dict[str, Any] = {
        "id": file.id,
        "type": "file",
        "filename": file.filename,
        "mime_type": file.mime_type,
        "size_bytes": file.size,
        "created_at": timestamp(file.created_at),
        "downloadable": file.downloadable,
    }
    if spoken.new_lists:
        found["expires_at"] = None if file.expires_at is None else timestamp(file.expires_at)
    if spoken.extensions:
        found |= {"sha256": file.sha256, "tags": list(file.tags), "user_id": file.user_id, "expired": file.expired}
    return found


def file_list(listing: Listing, spoken: Dialect, next_page: str | None) -> dict[str, Any]:
    """A page of a list."""
    found: dict[str, Any] = {"data": [file_metadata(file, spoken) for file in listing.files]}
    if spoken.new_lists:
        found["next_page"] = next_page
    if spoken.old_lists:
        found |= list_ends([file.id for file in listing.files], listing.more)
    return found


def file_deleted(id: str, receipt: dict[str, Any], spoken: Dialect) -> dict[str, Any]:
    """What is told about a file that is no more."""
    return {"id": id, "type": "file_deleted"} | ({"receipt": receipt} if spoken.extensions else {})


class Cursors:
    """Places in a list, as opaque text: signed, and of no use in another workspace or for another user."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def write(self, scope: str, place: Place) -> str:
        content = place[0].to_bytes(8, "big") + place[1].encode()
        sealed = base64.urlsafe_b64encode(self._mac(scope, content) + content)
        return "page_" + sealed.decode().rstrip("=")

    def read(self, scope: str, cursor: str) -> Place:
        try:
            text = cursor.removeprefix("page_").encode("ascii")
            sealed = base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
            mac, content = sealed[:MAC_BYTES], sealed[MAC_BYTES:]
            # The text is compared too: decoding forgives stray characters, and one place has one cursor.
            if hmac.compare_digest(mac, self._mac(scope, content)) and cursor == self.write(scope, place := _place(content)):
                return place
        except (binascii.Error, UnicodeError):
            pass
        raise BadInput("page: this is not a cursor of this list; expected the `next_page` of an answer, as it was")

    def _mac(self, scope: str, content: bytes) -> bytes:
        return hmac.new(self._key, scope.encode() + b"\0" + content, hashlib.sha256).digest()[:MAC_BYTES]


def _place(content: bytes) -> Place:
    return int.from_bytes(content[:8], "big"), content[8:].decode()


# -- models ----------------------------------------------------------------------------------------------------------------------


def capabilities(*, sees: bool, thinks: bool) -> dict[str, Any]:
    """What a model of this machine can be asked for."""

    def support(is_so: bool, **more: bool | None) -> dict[str, Any]:
        parts = {name: None if so is None else {"supported": so} for name, so in more.items()}
        return {"supported": is_so, **parts}

    return {
        "batch": support(True),
        "citations": support(True),
        "code_execution": support(False),
        "context_management": support(
            False, clear_thinking_20251015=None, clear_tool_uses_20250919=None, compact_20260112=None
        ),
        "effort": support(thinks, low=thinks, medium=thinks, high=thinks, xhigh=thinks, max=thinks),
        "image_input": support(sees),
        "pdf_input": support(True),
        "server_tools": support(False, code_execution=False, web_search=False),
        "structured_outputs": support(True),
        "thinking": support(thinks)
        | {
            "types": {
                kind: support(thinks or kind == "disabled") for kind in ("adaptive", "between_tools", "disabled", "enabled")
            }
        },
    }


def model_info(
    id: str, display_name: str, created: str, longest: int | None = None, can: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What is told about a model; `created` is ISO 8601, `longest` the tokens of its context."""
    return {
        "type": "model",
        "id": id,
        "display_name": display_name,
        "created_at": datetime.fromisoformat(created).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": None,
        "capabilities": can,
        "max_input_tokens": longest,
        "max_tokens": None,
    }


def model_list(models: Sequence[dict[str, Any]], more: bool) -> dict[str, Any]:
    """A page of models, in the list shape that models still have."""
    return {"data": list(models)} | list_ends([model["id"] for model in models], more)


def list_ends(ids: Sequence[str], more: bool) -> dict[str, Any]:
    """The keys of a list in the older shape."""
    return {"has_more": more, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


# -- errors ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """An error as a client sees it."""

    status: int
    type: str
    message: str
    error_code: str | None = None
    details: Mapping[str, int | str] = field(default_factory=dict)
    retry_after: float | None = None

    def body(self, request_id: str) -> dict[str, Any]:
        error: dict[str, Any] = {"type": self.type, "message": self.message}
        if self.error_code is not None:
            error["details"] = {"error_code": self.error_code, **self.details}
        return {"type": "error", "error": error, "request_id": request_id}


def failure(error: BaseException) -> Failure:
    """What a client is told of an error: ours in its own words, any other without a word of what went wrong inside."""
    if isinstance(error, DamagedContent):
        return Failure(500, "api_error", "What is stored of this file is damaged, and damaged bytes are never sent.")
    # A full disk or a missing package is bad input on the command line, and here not the client's fault.
    if not isinstance(error, RopewalkError) or error.status == 500 or isinstance(error, OutputError | MissingExtra):
        return Failure(500, "api_error", "Internal server error; the server's log names it by this request's id.")
    return Failure(
        error.status,
        error.claude_type,
        str(error),
        error.error_code,
        error.details if isinstance(error, DocumentError) else {},
        error.retry_after if isinstance(error, RateLimited | Overloaded) else None,
    )


def error_body(error: BaseException, request_id: str) -> dict[str, Any]:
    """The envelope of an error."""
    return failure(error).body(request_id)
