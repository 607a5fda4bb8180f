"""The body of a request: bytes as they come, with an end to waiting; or JSON, of bounded size."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from ropewalk.errors import BadInput, TooLarge, UnreadableBody
from ropewalk.server.settings import ServerSettings

MAX_JSON_BYTES = 1 << 20
INFLATE_BYTES = 1 << 18  # at most so many come out of a compressed body at a time
CHARSETS = {"utf-8", "utf8", "iso-8859-1", "latin-1", "us-ascii", "ascii"}


def content_length(request: Request) -> int | None:
    """How many bytes of content the body will bring; None if that is not known before it has come."""
    text = request.headers.get("content-length", "")
    if encoding(request) != "identity" or not text.isascii() or not text.isdigit():
        return None
    return int(text)


def encoding(request: Request) -> str:
    """gzip or identity; anything else is refused."""
    name = request.headers.get("content-encoding", "").strip().lower() or "identity"
    if name not in ("identity", "gzip"):
        raise UnreadableBody(
            f"Content-Encoding '{name[:100]}' is not supported; send gzip, or the bytes as they are",
            "request_body_encoding_unsupported",
        )
    return name


async def read(request: Request) -> AsyncIterator[bytes]:
    """The bytes of the body, decompressed; UnreadableBody if they stop coming, or come too slowly."""
    check_charset(request)
    if encoding(request) == "identity":
        async for chunk in _timed(request):
            yield chunk
        return
    inflate = zlib.decompressobj(wbits=31)
    try:
        async for chunk in _timed(request):
            while chunk:
                if plain := inflate.decompress(chunk, INFLATE_BYTES):
                    yield plain
                chunk = inflate.unconsumed_tail
        if not inflate.eof:
            raise zlib.error("it ends too early")
        if inflate.unused_data:
            raise zlib.error("bytes follow its end")
    except zlib.error as error:
        raise UnreadableBody(
            f"the body is not the gzip that Content-Encoding says: {error}", "request_body_encoding_invalid"
        ) from error


async def read_json(request: Request, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The body as a JSON object; no body is an empty one."""
    content = bytearray()
    async for chunk in read(request):
        content += chunk
        if len(content) > limit:
            raise too_large(request, f"the body has more than {limit:,} bytes; it is expected to be a small JSON object")
    if not content:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise BadInput(f"the body is a JSON {type(found).__name__}; expected an object")
    return found


def too_large(request: Request, message: str) -> TooLarge:
    """TooLarge, told apart for a body that grew by being decompressed."""
    error = TooLarge(message)
    if encoding(request) != "identity":
        error.error_code = "request_body_too_large_after_decoding"
    return error


def check_charset(request: Request) -> None:
    """Refuses text in a charset that nobody here reads."""
    for parameter in request.headers.get("content-type", "").split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and (charset := value.strip().strip('"').lower()) not in CHARSETS:
            raise UnreadableBody(f"charset '{charset[:100]}' is not supported; send UTF-8", "unsupported_charset")


async def _timed(request: Request) -> AsyncIterator[bytes]:
    settings: ServerSettings = request.app.state.settings
    began, received = time.monotonic(), 0
    chunks = request.stream()
    while True:
        left = began + settings.slow_seconds + received / settings.slowest_bytes_per_second - time.monotonic()
        try:
            async with asyncio.timeout(min(settings.idle_seconds, left)):
                chunk = await anext(chunks, b"")
        except TimeoutError:
            raise UnreadableBody(
                f"the body came too slowly: {received:,} bytes in {time.monotonic() - began:.0f} s", "request_body_timeout"
            ) from None
        if not chunk:  # Starlette's stream ends with no bytes
            return
        received += len(chunk)
        yield chunk
