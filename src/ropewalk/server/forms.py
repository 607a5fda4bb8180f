"""Files that a page's form brings: they go into the store as they arrive, and none before the form has shown its token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from starlette.requests import Request

from ropewalk.errors import BadInput
from ropewalk.files.catalog import File
from ropewalk.files.incoming import Incoming, checked_expiry
from ropewalk.server import body, sessions
from ropewalk.server.multipart import Begin, Data, Multipart
from ropewalk.server.visitors import Visitor, request_id_of, store_of

FIELD_BYTES = 1024


async def receive(request: Request, visitor: Visitor, chunks: AsyncIterator[bytes], stored: list[File]) -> None:
    """Adds each file to `stored` once it is durable, so that who catches an error knows which ones are."""
    token = request.headers.get(sessions.TOKEN_HEADER)
    if token is not None:
        sessions.check_token(visitor.session, token)
    parser = Multipart(request.headers.get("content-type", ""))
    fields: dict[str, bytes] = {"csrf": (token or "").encode()}
    part: Begin | None = None
    async with AsyncExitStack() as under_way:
        incoming: Incoming | None = None
        async for chunk in chunks:
            for event in parser.feed(chunk):
                if isinstance(event, Begin):
                    part = event
                    if event.filename is None:
                        fields[event.name] = b""
                    elif event.filename:  # a form in which nothing was chosen has a file without a name
                        sessions.check_token(visitor.session, fields["csrf"].decode("utf-8", "replace"))
                        left = _left(request, parser, event, store_of(request).max_file_bytes)
                        coming = store_of(request).incoming(visitor.caller, left, request_id_of(request))
                        incoming = await under_way.enter_async_context(coming)
                elif isinstance(event, Data):
                    if incoming is not None:
                        await incoming.write(event.data)
                    elif part is not None and part.filename is None:
                        fields[part.name] += event.data
                        if len(fields[part.name]) > FIELD_BYTES:
                            raise BadInput(f"the field '{part.name[:60]}' has more than {FIELD_BYTES:,} bytes")
                elif incoming is not None and part is not None:
                    expires_in = checked_expiry(_seconds(fields.get("expires_in_seconds", b"")))
                    stored.append(await incoming.finish(part.filename, part.media_type, expires_in=expires_in))
                    incoming = None
                    await under_way.aclose()
        parser.close()


def _left(request: Request, parser: Multipart, part: Begin, most: int) -> int | None:
    """The most that this file can have: all that is still to come, but for what closes the body."""
    length = body.content_length(request)
    if length is None:
        return None
    return 0 if part.offset is None else max(0, min(most, length - part.offset - parser.closing))


def _seconds(value: bytes) -> int | None:
    if not value:
        return None
    if not (value.isdigit() and len(value) < 12):
        raise BadInput(f"expires_in_seconds: {value[:40].decode('utf-8', 'replace')!r} is not a whole number")
    return int(value)
