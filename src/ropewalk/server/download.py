"""The bytes of a file as an answer: whole or one range of them, with headers that keep a browser from taking them for a page."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import TypeAlias
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ropewalk.files.catalog import File

RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")

Span: TypeAlias = tuple[int, int]  # from, to before


def etag(file: File) -> str:
    """The SHA-256: equal bytes, equal tag."""
    return f'"{file.sha256}"'


def is_known(request: Request, file: File) -> bool:
    """Whether the client says that it has these bytes already."""
    known = request.headers.get("if-none-match", "")
    return known.strip() == "*" or etag(file) in [tag.strip().removeprefix("W/") for tag in known.split(",")]


def asked_span(request: Request, file: File) -> Span | None:
    """The range asked for; None is all of it, also where several ranges are asked for, as RFC 9110 allows (section 14.2)."""
    found = RANGE.fullmatch(request.headers.get("range", "").strip())
    if found is None or request.headers.get("if-range", etag(file)).strip() != etag(file):
        return None
    first, last = found.groups()
    if not first and not last:
        return None
    start = int(first) if first else max(0, file.size - int(last))
    end = min(int(last) + 1, file.size) if first and last else file.size
    if first and last and int(last) < int(first):
        return None
    if start >= file.size or start >= end:
        raise HTTPException(
            416, f"range: there are no such bytes; the file has {file.size:,}", {"content-range": f"bytes */{file.size}"}
        )
    return start, end


async def answer(file: File, span: Span | None, chunks: AsyncIterator[bytes]) -> Response:
    """The answer, its first chunk read: what is damaged from its beginning is an error, not a broken download."""
    start, end = span or (0, file.size)
    headers = _headers(file) | {"content-length": str(end - start)}
    if span:
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.size}"
    first = await anext(chunks, b"")
    return StreamingResponse(_from(first, chunks), 206 if span else 200, headers)


def head(file: File) -> Response:
    """What `answer` says before the bytes."""
    response = Response(headers=_headers(file))
    response.headers["content-length"] = str(file.size)
    return response


def not_modified(file: File) -> Response:
    """The client's copy is good."""
    return Response(status_code=304, headers={name: _headers(file)[name] for name in ("etag", "cache-control")})


def disposition(filename: str) -> str:
    """`attachment` with the name in ASCII, and in full by RFC 5987."""
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def _headers(file: File) -> dict[str, str]:
    return {
        "content-type": file.mime_type,
        "content-disposition": disposition(file.filename),
        "accept-ranges": "bytes",
        "etag": etag(file),
        # Asked again each time: what has been deleted is not to be had from a cache.
        "cache-control": "private, no-cache",
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
    }


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk
